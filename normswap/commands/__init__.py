"""What the command line does, and the part of the Python surface that deals with files: `load` in front of the pipeline, `save`, `export`
and `report` behind it. One module for each command, named as it:

    convert  inspect  verify  export  fold  revert  sensitivity  landscape

and what several of them need:

directory         a converted directory, written and read: `normswap.save`, `normswap.load`
sources           what a command is given as a model, and the inputs that are known of it
options           what --data, --rule, --metric and --loss name
verified_export   an ONNX file that is held against its model; folds that break it are undone
onnx_legs         what comes of an ONNX file in each runtime
"""
