"""Says what was decided, what was measured and what was written: as JSON, as one HTML page, as a table. Measures nothing itself.

One module for each thing that is told, each with its JSON, its table and its summary:

conversion    of `convert` and `inspect`; its tables are in `tables`, its page in `page`, and what both show, row by row, in `rows`
parity        of `verify`: one comparison, and the legs of a conversion
export        of `export`: where the norms of an ONNX file went, and CUDA
fold  sensitivity  landscape

and what they share: `fields` of the JSON, and `words`. docs/report.md documents the JSON.
"""
