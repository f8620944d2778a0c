"""What each quantized format costs in bits and in error: the table of kernels/quant/README.md.

python -m tilewright.bench.quant_errors
"""

import torch

import tilewright
from tilewright import FP4, FP8, MXFP4, NF4, Int4, Int8

FORMATS = (
    Int8(), Int8(64), FP8("tensor"), FP8("row"), FP8("block"),
    Int4(32), Int4(64), Int4(128), Int4(None), Int4(64, solver="minmax"),
    Int4(64, symmetric=False), Int4(64, symmetric=False, solver="minmax"),
    NF4(64), NF4(64, double_quant=True), FP4(64), MXFP4(),
)  # fmt: skip
SHAPE = (1024, 4096)


def weights() -> dict[str, torch.Tensor]:
    """Float32 weights: N(0, 0.02), and Student's t with three degrees of freedom times 0.01."""
    torch.manual_seed(0)
    normal = torch.randn(SHAPE)
    # t = z / sqrt(chi-square / 3), from normals alone
    heavy = torch.randn(SHAPE) / (torch.randn(3, *SHAPE).square().mean(0)).sqrt()
    return {"normal": 0.02 * normal, "heavy-tailed": 0.01 * heavy}


def main() -> None:
    drawn = weights()
    print("| format | bits a weight | " + " | ".join(f"{name}: rms, SQNR" for name in drawn) + " |")
    print("| --- | --- | " + " | ".join("---" for _ in drawn) + " |")
    for format in FORMATS:
        found = [
            tilewright.error_statistics(w, tilewright.quantize_weight(w, format))
            for w in drawn.values()
        ]
        errors = [f"{f.rms_relative_error:.2%}, {f.sqnr_db:.1f} dB" for f in found]
        print(f"| `{format}` | {found[0].bits_per_weight:.3f} | " + " | ".join(errors) + " |")


if __name__ == "__main__":
    main()
