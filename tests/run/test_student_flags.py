"""--layers, --expand, --mixer, --no_z_bias of a student that is there: what differs is refused, the card is true."""

import re

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


MAMBA2 = dict(expand=2, mixer="mamba2", no_z_bias=True)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory, tiny_teacher, sources):
    """A student with two mamba2 heads for each attention head, and gates without bias."""
    output = tmp_path_factory.mktemp("scaled") / "run"
    assert train.main(runs.flags(tiny_teacher, sources, output, **SMALL, **MAMBA2)) == 0
    return output


@pytest.mark.parametrize("given", [{}, MAMBA2, {"mixer": "mamba2"}], ids=str)
def test_the_card_of_a_new_run_tells_the_students_own_mixers(scaled, tiny_teacher, sources, tmp_path, given):
    options = {**SMALL, "max_steps": 1, "student_model": scaled / "final", "layers": None, **given}
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "new", **options)) == 0
    flags = read_metadata(tmp_path / "new" / "final")["flags"]
    assert {name: flags[name] for name in MAMBA2} == MAMBA2
    card = (tmp_path / "new" / "final" / "README.md").read_text()
    assert "| `--expand` | `2` |" in card and "| `--mixer` | `mamba2` |" in card
    longer = {**options, "max_steps": 2, "resume_force": True, **(MAMBA2 if not given else {})}
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "new", **longer)) == 0  # the same, otherwise said
    assert {name: read_metadata(tmp_path / "new" / "final")["flags"][name] for name in MAMBA2} == MAMBA2


@pytest.mark.parametrize(
    ("of", "given", "told"),
    [
        ("scaled", {"expand": 1}, "--expand 1: .*final has mixers of its own, with --expand 2"),
        ("scaled", {"mixer": "llamba"}, "--mixer llamba: .*, with --mixer mamba2"),
        ("distilled", {"expand": 2}, "--expand 2: .*, with --expand 1"),
        ("distilled", {"no_z_bias": True}, "--no_z_bias: .*, with a gate with a bias"),
    ],
)
def test_other_mixers_are_refused(request, tiny_teacher, sources, tmp_path, capfd, of, given, told):
    student = request.getfixturevalue(of) / "final"
    options = {**SMALL, "student_model": student, "layers": None, **given}
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "new", **options)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and re.search(told, lines[0]) and not list((tmp_path / "new").rglob("*"))


def test_a_resumed_run_that_does_not_name_its_mixers_keeps_them(scaled, tiny_teacher, sources, tmp_path, capfd):
    runs.copy_up_to(scaled, "stable-stage1", tmp_path / "run")
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "run", **SMALL)) == 0
    assert {name: read_metadata(tmp_path / "run" / "final")["flags"][name] for name in MAMBA2} == MAMBA2
    again = runs.flags(tiny_teacher, sources, tmp_path / "run", **{**SMALL, "max_steps": 9, "expand": 1})
    assert train.main(again) == 2 and "--expand was 2 and is 1" in capfd.readouterr().err
