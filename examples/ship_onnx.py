"""Ship a network as ONNX without a normalization operator, and let the comparison say that it is the same function."""

import tempfile
from pathlib import Path

import onnxruntime
from digits import TEST, images, labels, pretrained

import normswap

model = pretrained()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.onnx"
    conversion = normswap.convert(model, images[:5])
    export = normswap.export_onnx(conversion, images[:5], path)
    print(f"{len(export.folded)} norms folded into their layers, {len(export.residue)} left; operators: {dict(export.nodes)}")
    assert not export.residue

    parity = normswap.verify(model, path, images[:5])
    print(f"the file against the original: largest error {parity.max_rel:.1e}, the same function: {parity.passed}")
    assert parity

    session = onnxruntime.InferenceSession(path)
    (scores,) = session.run(None, {export.input_names[0]: images[TEST].numpy()})
    print(f"right in onnxruntime: {(scores.argmax(1) == labels[TEST].numpy()).mean():.0%}")
