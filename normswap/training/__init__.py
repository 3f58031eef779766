"""Training a converted model: the auxiliary loss, parameter groups, masks, micro-batches.

The mechanism is in `batchless` (what a layer does in train mode), `injection` (autograd) and `stepping` (optimizers); here are its doors.
"""
