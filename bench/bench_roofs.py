"""Measure the roofs and describe the machine: writes roofs.csv and machine.json.

python bench/bench_roofs.py --save
"""

import json
import sys

import harness
import machine
import torch
from roofs import COPIED, DEVICE, SIDE, measure_roofs


def under_load() -> str:
    """What nvidia-smi says of clocks and power while the GPU multiplies."""
    a, b = torch.randn(2, 8192, 8192, device=DEVICE).bfloat16()
    for _ in range(400):  # about half a second, longer than nvidia-smi takes to answer
        a @ b
    said = machine.ask_gpu("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
    torch.cuda.synchronize()
    return said


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    out, roofs, about = harness.folder(args), measure_roofs(), harness.provenance()
    size = f"{COPIED >> 30} GiB" if DEVICE == "cuda" else f"{COPIED >> 10} KiB"
    a, b = torch.randn(2, SIDE, SIDE, device=DEVICE).bfloat16()
    around = harness.conditions(lambda: a @ b)
    rows = [
        harness.Row(kernel="roofs", provider=provider, shape=shape, **rate, **around, **about)
        for provider, shape, rate in (
            ("bf16 product", f"{SIDE} x {SIDE} x {SIDE}", {"tflop_s": roofs.matmul_tflop_s}),
            ("device copy, read and written", size, {"gb_s": roofs.copy_gb_s}),
        )
    ]
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"multiprocessors": properties.multi_processor_count, "memory_gb": properties.total_memory / 1e9}
        about |= {"under load: sm, memory and highest sm clock, power, its limit, temperature": under_load()}
    print(f"{json.dumps(about, indent=1)}\n{roofs}", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        for row in rows:
            harness.show(row, as_json=True)
    if out:
        harness.save(rows, out / "roofs.csv")
        (out / "machine.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
