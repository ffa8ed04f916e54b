"""A pair that is sharded before its weights are read has the weights of one that is loaded whole, to the bit."""

import shutil

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from arguments import parse_arguments
from checkpoints.origins import Origins
from conftest import tiny_llama_config
from distill.initialization import student_config
from hardware.parallel import Ranks
from hardware.sharded_weights import WeightFiles
from models import LlambaForCausalLM
from run.build import build_models, starts_sharded
from run.inputs import Inputs
from utils import UserError

CPU = torch.device("cpu")


class Text:
    """What a start asks of `run.text.RunText`."""

    origins = Origins()

    def calibration_tokens(self, name):
        return torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saved_teacher(folder, **changes):
    from transformers import AutoConfig

    kind = changes.pop("model_type", "llama")
    config = tiny_llama_config(**changes)
    if kind != "llama":
        fields = {
            name: value for name, value in config.to_dict().items() if name not in ("model_type", "rope_scaling")
        }
        config = AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="200KB")
    return folder


def built(teacher, student, way, *flags, need="throughout"):
    args = parse_arguments(["--teacher_model", str(teacher), "--device", "cpu", "--layers", "1", *flags])
    inputs = Inputs(Text(), None, None, None, need, way)
    assert starts_sharded(inputs) is (way == "fsdp")
    torch.manual_seed(1)
    return build_models(args, str(student), inputs, (CPU, CPU), Ranks())


def tensors(model):
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in named}


def assert_equal_starts(teacher, student, *flags):
    whole, sharded = (built(teacher, student, way, *flags) for way in ("none", "fsdp"))
    for ours, theirs in ((whole.student, sharded.student), (whole.teacher, sharded.teacher)):
        expected, found = tensors(ours), tensors(theirs)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert whole.student.config.to_dict() == sharded.student.config.to_dict()
    trains = [[(n, p.requires_grad) for n, p in pair.student.named_parameters()] for pair in (whole, sharded)]
    assert trains[0] == trains[1]
    tokens = torch.randint(0, 512, (2, 33))
    terms = []
    for pair in (whole, sharded):
        hidden = pair.teacher_states.backbone(tokens[:, :-1], None)
        valid = torch.ones(2, 32, dtype=torch.bool)
        terms.append(pair.student_loss(tokens[:, :-1], tokens[:, 1:], valid, None, hidden, torch.tensor(1.0)))
    assert torch.equal(terms[0].loss, terms[1].loss) and torch.equal(terms[0].kl_sum, terms[1].kl_sum)
    return whole, sharded


@pytest.mark.parametrize(
    "kind, flags",
    [
        ({}, ["--dtype", "float32"]),
        ({"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, ["--dtype", "bfloat16"]),
        ({}, ["--dtype", "float16", "--freeze_mlp"]),
        ({"model_type": "qwen2"}, ["--dtype", "bfloat16", "--expand", "2"]),
        ({"model_type": "qwen3"}, ["--dtype", "float32", "--freeze_embeddings"]),
    ],
    ids=["float32", "tied with biases", "float16", "Qwen2, two heads for one", "Qwen3"],
)
def test_a_start_from_the_teacher(kind, flags, group, tmp_path):
    assert_equal_starts(saved_teacher(tmp_path / "teacher", **kind), "from_teacher", *flags)


def test_a_published_student_and_a_distilled_one(group, tmp_path):
    teacher = saved_teacher(tmp_path / "teacher")
    torch.manual_seed(5)
    LlambaForCausalLM(student_config(AutoModelForCausalLM.from_pretrained(teacher).config)).save_pretrained(
        tmp_path / "published"
    )
    whole, _ = assert_equal_starts(teacher, tmp_path / "published", "--dtype", "float32")
    whole.student.save_pretrained(tmp_path / "distilled")
    assert_equal_starts(teacher, tmp_path / "distilled", "--dtype", "bfloat16")


def test_a_teacher_that_is_not_kept(group, tmp_path):
    teacher = saved_teacher(tmp_path / "teacher")
    flags = ("--dtype", "float32", "--kl_weight", "0", "--ce_weight", "1")
    whole = built(teacher, "from_teacher", "none", *flags)
    sharded = built(teacher, "from_teacher", "fsdp", *flags, need="at the start")
    assert sharded.teacher is sharded.teacher_states is sharded.teacher_head is None
    expected, found = tensors(whole.student), tensors(sharded.student)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_every_key_is_accounted_for(group, tmp_path):
    from safetensors.torch import load_file, save_file

    teacher = saved_teacher(tmp_path / "teacher")
    built(teacher, "from_teacher", "none", "--dtype", "float32").student.save_pretrained(tmp_path / "whole")
    faults = {
        "missing": lambda w: w.pop("backbone.layers.0.mixer.D"),
        "unexpected": lambda w: w.update(stranger=torch.zeros(1)),
        "misshapen": lambda w: w.update({"backbone.layers.0.mixer.D": torch.zeros(9)}),
    }
    for kind, change in faults.items():
        shutil.copytree(tmp_path / "whole", tmp_path / kind)
        weights = load_file(tmp_path / kind / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"{kind} keys: .*(mixer\.D|stranger)"):
            built(teacher, tmp_path / kind, "fsdp", "--dtype", "float32")


def test_a_pickled_file_is_mapped(group, tmp_path):
    teacher = saved_teacher(tmp_path / "teacher")
    state = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    (tmp_path / "pickled").mkdir()
    for file in ("config.json", "generation_config.json"):
        shutil.copy(teacher / file, tmp_path / "pickled" / file)
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    parameter = torch.empty_like(state["lm_head.weight"])
    WeightFiles(tmp_path / "pickled").read_into(parameter, "lm_head.weight")
    assert torch.equal(parameter, state["lm_head.weight"])
    assert_equal_starts(tmp_path / "pickled", "from_teacher", "--dtype", "float32")
