"""Metrics that need weights take those that the user has, and nothing else."""

import json

import numpy as np
import pytest

for package in ("av", "cv2", "matplotlib"):
    pytest.importorskip(package, reason='needs pip install "flexkern[metrics]"')

from flexkern.metrics import load_model, measure
from flexkern.metrics.weights import Consistency, Score

PICTURES = np.random.default_rng(0).integers(0, 256, (40, 24, 32, 3), dtype=np.uint8)


def test_consistency_is_that_of_vbench():
    features = np.array([[1, 0], [0, 2], [3, 3], [-1, 0]])
    found = Consistency(lambda pictures: features)(PICTURES[:4])
    half = np.sqrt(0.5)
    assert np.isnan(found[0]) and found[1:] == pytest.approx([0, half, 0])


def test_batches_go_on_where_the_last_one_ended():
    embed = lambda pictures: pictures.reshape(len(pictures), -1)[:, :50]
    whole, parts = Consistency(embed), Consistency(embed)
    expected = whole(PICTURES)
    found = np.concatenate([parts(PICTURES[:7]), parts(PICTURES[7:])])
    assert found == pytest.approx(expected, nan_ok=True)
    report = measure(PICTURES, fps=8, learned={"subject": embed, "imaging": lambda p: p.mean((1, 2, 3))})
    assert report.curves["subject"] == pytest.approx(expected, nan_ok=True)
    assert report.curves["imaging"] == pytest.approx(PICTURES.mean((1, 2, 3)))
    assert {"subject_drift", "imaging_change"} <= set(report.summary)


def test_what_a_model_returns_is_checked():
    with pytest.raises(ValueError, match=r"an embedder must return \[40, D\], got \[40\]"):
        Consistency(lambda pictures: np.ones(40))(PICTURES)
    with pytest.raises(ValueError, match=r"a scorer must return \[40\], got \[40, 2\]"):
        Score(lambda pictures: np.ones((40, 2)))(PICTURES)
    with pytest.raises(ValueError, match="learned metrics are subject, background, imaging, got taste"):
        measure(PICTURES, fps=8, learned={"taste": len})


def test_where_models_come_from():
    assert load_model("numpy:ones") is np.ones
    with pytest.raises(ValueError, match="no callable numpy:nothing"):
        load_model("numpy:nothing")
    with pytest.raises(ValueError, match="numpy:pi must be callable, got float"):
        load_model("numpy:pi")
    with pytest.raises(ValueError, match="models/dino is neither a folder of transformers nor module:name"):
        load_model("models/dino")


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_a_local_folder_of_transformers_embeds(tmp_path, kind, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a GPU convolves in TF32
    transformers = pytest.importorskip("transformers", reason='needs pip install "flexkern[model]"')
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "dino":
        model = transformers.ViTModel(transformers.ViTConfig(image_size=24, patch_size=8, **sizes))
    else:
        vision = transformers.CLIPVisionConfig(image_size=24, patch_size=8, projection_dim=8, **sizes)
        text = transformers.CLIPTextConfig(vocab_size=16, projection_dim=8, **sizes)
        config = transformers.CLIPConfig(projection_dim=8, text_config=text.to_dict(), vision_config=vision.to_dict())
        model = transformers.CLIPModel(config)
    model.eval().save_pretrained(tmp_path)
    half = [0.5, 0.5, 0.5]
    config = {"size": {"height": 24, "width": 24}, "image_mean": half, "image_std": half}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))

    found = load_model(str(tmp_path))(PICTURES[:3])
    pixels = torch.from_numpy(PICTURES[:3, :, 4:28]).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        if kind == "dino":
            expected = model(pixel_values=pixels).last_hidden_state[:, 0]
        else:
            expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    assert found == pytest.approx(expected.numpy(), abs=1e-4)
