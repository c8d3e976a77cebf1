"""A method of your own: fields of a preset replaced, and what that does to the temporal bands.

    python own_preset.py

The same fields are options of the command line:

    flexkern render --preset flex --position.alpha 0.05 --position.beta 0.25 --retention.sink 6
"""

from flexkern.policies import get_preset

BANDS = 22  # temporal bands of a Wan model with heads of 128 channels
gentle = get_preset("flex", {"position.alpha": 0.05, "position.beta": 0.25, "retention.sink": 6})

for preset in (get_preset("flex"), gentle):
    position = preset.position
    scale = position.scales(query=[239, 240, 241])[-1]  # the chunk that ends the first minute
    slowed = position.multipliers(scale, BANDS)[0]
    low, high = position.thresholds
    print(f"alpha {low}, beta {high}, sink {preset.retention.pinned}: scale {scale:.2f}")
    print("  speed of the bands:", " ".join(f"{one:.2f}" for one in slowed))
