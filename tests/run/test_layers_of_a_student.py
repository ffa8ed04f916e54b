"""--layers with a student that is distilled already: what differs is refused, and nothing is said where it agrees."""

import pytest

import train
from checkpoints.run_state import read_metadata
from helpers import runs
from run import saving

pytestmark = pytest.mark.slow

SMALL = dict(seq_length=32, batch_size=1, max_steps=3, skip_stage2=True)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(saving, "plot_runs", lambda *_: None)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, tiny_teacher, sources):
    """A student whose attention layers are 0 and 2."""
    output = tmp_path_factory.mktemp("distilled") / "run"
    assert train.main(runs.flags(tiny_teacher, sources, output, layers=["2", "0"], **SMALL)) == 0
    return output


@pytest.mark.parametrize("layers", [["1"], ["0"], ["0", "2", "3"], ["-1"], ["auto:2"]], ids=" ".join)
def test_other_layers_are_refused(distilled, tiny_teacher, sources, tmp_path, capfd, layers):
    """In a new run from its weights, and where its own run is resumed, with --resume_force too."""
    new = runs.flags(
        tiny_teacher, sources, tmp_path / "new", student_model=distilled / "final", layers=layers, **SMALL
    )
    assert train.main(new) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and f"--layers {' '.join(layers)}" in lines[0] and "attention layers are 0 2" in lines[0]
    options = {**SMALL, "max_steps": 6, "layers": layers, "resume_force": True}
    assert train.main(runs.flags(tiny_teacher, sources, distilled, **options)) == 2
    assert f"--layers was 2 0 and is {' '.join(layers)}" in capfd.readouterr().err


@pytest.mark.parametrize("layers", [None, ["0", "2"], ["2", "0", "-1"]])
def test_a_new_run_with_the_same_layers_or_none(distilled, tiny_teacher, sources, tmp_path, capfd, layers):
    """The card then says what the student has."""
    options = {**SMALL, "max_steps": 1, "student_model": distilled / "final", "layers": layers}
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "new", **options)) == 0
    assert "--layers" not in "".join(capfd.readouterr())
    flags = read_metadata(tmp_path / "new" / "final")["flags"]
    assert flags["layers"] == ((layers and [int(index) for index in layers]) or [0, 2])
    card = (tmp_path / "new" / "final" / "README.md").read_text()
    assert "attention layers kept: 0 2" in card and "10, 14" not in card


@pytest.mark.parametrize("layers", [None, ["0", "2"], ["2", "0"]])
def test_a_run_that_resumes_says_nothing_of_it(distilled, tiny_teacher, sources, tmp_path, capfd, layers):
    runs.copy_up_to(distilled, "stable-stage1", tmp_path / "run")
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "run", **SMALL, layers=layers)) == 0
    assert "--layers" not in "".join(capfd.readouterr())
    assert read_metadata(tmp_path / "run" / "final")["flags"]["layers"] in ([2, 0], [0, 2])
