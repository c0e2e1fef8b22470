"""A calibration's files: a preset with its evidence, and a picture."""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from calibrated import found, samples
from PIL import Image

import fastkv_jax as fk
from fastkv_jax.calibration.samples import digest
from fastkv_jax.methods import presets


def test_a_saved_preset_is_one(tmp_path, monkeypatch):
    found().save(tmp_path / "mine.yaml")
    configs = tmp_path / "configs"
    (configs / "methods").mkdir(parents=True)
    (configs / "models").mkdir()
    shutil.copy(tmp_path / "mine.yaml", configs / "models")
    by_path = presets.load(str(tmp_path / "mine.yaml"))
    chosen = dataclasses.replace(found().method(), min_prompt_to_compress=512)
    settings = list(found().preset())
    monkeypatch.setattr(presets, "_configs", lambda: configs)
    for preset in (by_path, presets.load("mine"), presets.for_model("mine")):
        assert (preset.name, preset.window_end) == ("mine", "question")
        assert presets.build("fastkv", preset, {}, 4) == chosen
    shipped = Path(__file__).parents[2] / "configs" / "models" / "smollm2-135m.yaml"
    assert settings == list(yaml.safe_load(shipped.read_text())["preset"])


def test_a_saved_preset_brings_its_evidence(tmp_path):
    found().save(tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    saved = yaml.safe_load(text)["calibration"]
    assert text.startswith(f"# A: {found().right_chosen} of 3 answers right, full context 1; ")
    assert saved == found().evidence() and saved["samples_sha256"] == found().digest
    for setting, distance in zip(found().finalists, found().distance, strict=True):
        np.testing.assert_allclose(saved["finalists"][str(setting)]["distance"], distance, rtol=1e-3)
    assert (saved["layers"], saved["right_full"], saved["tolerance"]) == ([0, 1, 2], 1, 0.1)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_the_digest_tells_samples_apart():
    one = samples()[0]
    others = [dataclasses.replace(one, window_end=1), dataclasses.replace(one, answer=(1,)), samples()[1]]
    assert len({digest([sample]) for sample in [one, *others]}) == 4
    assert digest(samples()) == found().digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "has no usable section 'preset'"),
        ("other: 1", "has no usable section 'preset'"),
        ("preset: {window_end: x}", "window_end must be 'question' or 'prompt', got 'x'"),
        ("preset: {window_end: prompt, kernel: 3}", "kernel is not a setting; there are: "),
    ],
)
def test_a_preset_file_that_is_none_is_named(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(fk.FastKVConfigError) as error:
        presets.load(str(tmp_path / "mine.yaml"))
    assert message in str(error.value) and str(tmp_path / "mine.yaml") in str(error.value)


def test_the_picture_is_drawn_with_and_without_answers(tmp_path):
    nothing = np.full_like(found().propagated, np.nan)
    blank = dataclasses.replace(found(), answers=0, propagated=nothing, kept_mean=nothing, kept_best=nothing)
    pictures = []
    for result in (found(), blank):
        result.plot(tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            pictures.append(np.asarray(picture.convert("L")))
        assert pictures[-1].shape == (984, 1620)
    assert (pictures[0] != pictures[1]).mean() > 0.01


def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    for write, suffix in ((found().save, ".yaml"), (found().plot, ".png")):
        with pytest.raises(fk.FastKVConfigError, match=f"its name must end in {suffix}"):
            write(tmp_path / "x.txt")
        with pytest.raises(fk.InputError, match="there is no folder"):
            write(tmp_path / "no" / f"x{suffix}")
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(fk.FastKVConfigError, match=r"pip install 'fastkv-jax\[explain\]'"):
        found().plot(tmp_path / "x.png")
