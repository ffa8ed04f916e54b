"""What `make lint` finds where files do not stand as they should."""

import house


def test_circles_are_found_whatever_their_length_and_named_by_their_way():
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"d"}}
    assert list(house.circles(edges)) == ["a -> b -> c -> a"]
    assert not list(house.circles(edges | {"c": {"d"}}))


def test_imports_count_within_functions_too(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def f():\n    from text import packing\n    import run.plan\n    import json\n")
    known = dict.fromkeys(("optim.own", "text", "text.packing", "run.plan"), file)
    assert house.imports("optim.own", file, known) == {"text", "text.packing", "run.plan"}


def test_arrows_point_from_scripts_to_run_to_the_rest_to_models():
    allowed = {
        "train": {"run.build", "arguments"},
        "arguments": {"flags.reading"},
        "flags.page": {"utils"},
        "run.build": {"arguments", "models"},
        "optim.step": {"utils"},
    }
    assert not list(house.wrong_arrows(allowed))
    wrong = {
        "optim.step": {"arguments", "run.plan", "train"},
        "text.own": {"flags.page"},
        "flags.page": {"arguments", "hub"},
        "models.cache": {"utils"},
        "trainer": {"run.plan"},
    }
    assert list(house.wrong_arrows(wrong)) == [
        "flags.page imports arguments: scripts and run/ alone do",
        "flags.page imports arguments: flags imports utils alone",
        "flags.page imports hub: flags imports utils alone",
        "models.cache imports utils: models imports nothing of the project",
        "optim.step imports arguments: scripts and run/ alone do",
        "optim.step imports run.plan: scripts and run/ alone do",
        "optim.step imports train, a script",
        "text.own imports flags.page: arguments, scripts and run/ alone do",
        "trainer imports run.plan: scripts and run/ alone do",
    ]


def test_a_name_is_defined_once(tmp_path):
    (tmp_path / "a.py").write_text("def one(): ...\ndef _own(): ...\nclass Two: ...\n")
    (tmp_path / "b.py").write_text("def one(): ...\ndef _own(): ...\n")
    known = {"optim.a": tmp_path / "a.py", "text.b": tmp_path / "b.py", "train": tmp_path / "a.py"}
    assert list(house.shared_names(known)) == ["one is defined in optim.a and text.b"]
