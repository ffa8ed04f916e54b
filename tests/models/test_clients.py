"""Other trainers with a distilled checkpoint as it stands, through its remote code: transformers, TRL, peft.

Losses and weights are compared with `trainer.run_stage` over the same batches, in float32.
"""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from data import Batch
from distill.distillation import StudentLoss, kd_micro_step
from helpers import runs
from helpers.stages import Batches
from loop.forms import Progress, Stage
from models import LlambaForCausalLM
from optim.build import build_optimizer
from optim.masters import BETAS, EPS
from optim.schedule import Phases, build_schedule
from trainer import Services, run_stage

pytestmark = pytest.mark.slow
STEPS, ACCUMULATION = 20, 2


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, tiny_teacher, sources, run_script):
    """`final` of a short run: a hybrid with one attention layer."""
    output = tmp_path_factory.mktemp("run")
    flags = runs.flags(tiny_teacher, sources, output, max_steps=2, skip_stage2=True)
    assert run_script("train.py", *flags).returncode == 0
    return output / "final"


@pytest.fixture(scope="module")
def tokenizer(distilled):
    return AutoTokenizer.from_pretrained(distilled, trust_remote_code=True)


def remote(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


def texts(tokenizer, documents, count=400):
    """Tokenised pieces of 5 to 60 tokens."""
    tokens = tokenizer("\n".join(documents[:40])).input_ids
    lengths = torch.randint(5, 60, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    assert sum(lengths) <= len(tokens)
    return [{"input_ids": part.tolist()} for part in torch.tensor(tokens[: sum(lengths)]).split(lengths)]


class Kept:
    """A collator that keeps what it makes."""

    def __init__(self, collator):
        self.collator, self.batches = collator, []

    def __call__(self, rows):
        batch = self.collator(rows)
        self.batches.append({name: value.clone() for name, value in batch.items() if torch.is_tensor(value)})
        return batch


SETTINGS = dict(
    max_steps=STEPS,
    per_device_train_batch_size=3,
    gradient_accumulation_steps=ACCUMULATION,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    weight_decay=0.0,
    optim="adamw_torch",
    adam_beta1=BETAS[0],
    adam_beta2=BETAS[1],
    adam_epsilon=EPS,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
)


def own_loop(folder, batches):
    """Losses of every step and the student after them, of the project's own loop with hard labels alone."""
    model = LlambaForCausalLM.load(str(folder)).train()
    step = StudentLoss(model, None, kl_weight=0.0, ce_weight=1.0)
    optimizer = build_optimizer("adamw", step, lr=1e-3, weight_decay=0.0)
    schedule = build_schedule(optimizer, Phases.of(STEPS, 0.0, 0.0), max_lr=1e-3, min_lr=1e-3)
    given = [
        Batch(
            tokens=batch["input_ids"],  # the loop's inputs are all but the last
            valid=batch["labels"][:, 1:] != -100,
            position_ids=batch["position_ids"][:, :-1],
            document_ids=[],
        )
        for batch in batches[: STEPS * ACCUMULATION]
    ]
    stage = Stage(
        "stage1", Batches(given), kd_micro_step(step, None), step, optimizer, schedule, STEPS, ACCUMULATION,
        grad_clip=1e9,
    )  # fmt: skip
    progress, losses = Progress(), []
    progress.begin("stage1", STEPS)
    services = Services(lambda number, figures: losses.append(figures["train/loss"]), lambda *_: None)
    assert run_stage(stage, progress, services)
    return losses, model


def compare(trainer, folder, batches):
    """A trainer's losses and final weights are those of the project's own loop."""
    assert len(batches) >= STEPS * ACCUMULATION
    assert all((batch["position_ids"] == 0).sum() > 1 for batch in batches)  # packed
    wanted, model = own_loop(folder, batches)
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert found == pytest.approx(wanted, rel=1e-4) and wanted[-1] < wanted[0]
    trained = trainer.model.state_dict()
    for name, weight in model.state_dict().items():
        apart = (trained[name] - weight).abs() > 2e-5
        # Adam takes whole steps where a gradient is nothing but rounding, as of tokens that are hardly there
        assert apart.sum() <= max(4, 5e-3 * apart.numel()), f"{name}: {apart.sum()} of {apart.numel()} entries"


def test_transformers_trainer(distilled, tokenizer, documents, tmp_path):
    collator = Kept(DataCollatorWithFlattening())
    trainer = Trainer(
        model=remote(distilled),
        args=TrainingArguments(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=texts(tokenizer, documents),
        data_collator=collator,
    )
    assert type(trainer.model).__module__.startswith("transformers_modules.")
    trainer.train()
    compare(trainer, distilled, collator.batches)


def test_trls_sft_trainer(distilled, tokenizer, documents, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: it is in requirements-lock.txt")
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        model=remote(distilled),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), packing=True, max_length=96, gradient_checkpointing=False, **SETTINGS
        ),
        train_dataset=Dataset.from_list(texts(tokenizer, documents)),
        processing_class=tokenizer,
    )
    trainer.data_collator = collator = Kept(trainer.data_collator)
    trainer.train()
    compare(trainer, distilled, collator.batches)


def test_a_lora_trains_merges_and_loads_again(distilled, tokenizer, documents, tmp_path):
    """On in_proj and the attention layer's projections; a mixer's rows are no multiple of 8 here."""
    peft = pytest.importorskip("peft", reason="peft is not installed: it is in requirements-lock.txt")
    targets = ["in_proj", "out_proj", "q_proj", "v_proj"]
    base = remote(distilled)
    assert base.backbone.layers[0].mixer.in_proj.out_features % 8
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "trainer"), **SETTINGS | {"learning_rate": 1e-2}),
        train_dataset=texts(tokenizer, documents),
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-5:]) < sum(losses[:5])
    adapted = [name for name, value in model.named_parameters() if "lora_B" in name and value.abs().max() > 0]
    assert len(adapted) == 3 * 2 + 2  # in_proj and out_proj of three mixers, q and v of the attention layer
    tokens = torch.tensor([texts(tokenizer, documents)[0]["input_ids"]])
    before, wanted = (logits(each, tokens) for each in (remote(distilled), model))
    assert (wanted - before).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(remote(distilled), tmp_path / "adapter")
    assert torch.allclose(logits(again, tokens), wanted, atol=1e-5)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for merged in (remote(tmp_path / "merged"), LlambaForCausalLM.load(str(tmp_path / "merged"))):
        assert torch.allclose(logits(merged, tokens), wanted, atol=1e-4)


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


def test_evaluation_of_packed_batches(distilled, tokenizer, documents, tmp_path):
    """`Trainer.evaluate` keeps documents apart: its loss is the plain loss of each document alone."""
    rows = texts(tokenizer, documents, 24)
    trainer = Trainer(
        model=remote(distilled),
        args=TrainingArguments(output_dir=tmp_path, per_device_eval_batch_size=6, report_to="none", use_cpu=True),
        eval_dataset=rows,
        data_collator=DataCollatorWithFlattening(),
    )
    found = trainer.evaluate()["eval_loss"]
    model = LlambaForCausalLM.load(str(distilled)).eval()
    batches = []
    for start in range(0, len(rows), 6):
        losses = [
            F.cross_entropy(logits(model, tokens)[0, :-1], tokens[0, 1:], reduction="none")
            for tokens in (torch.tensor([row["input_ids"]]) for row in rows[start : start + 6])
        ]
        batches.append(torch.cat(losses).mean())
    assert found == pytest.approx(torch.stack(batches).mean().item(), rel=1e-5)


def test_the_backbone_alone(distilled):
    """AutoModel loads the same checkpoint without its head."""
    backbone = AutoModel.from_pretrained(distilled, trust_remote_code=True, dtype=torch.float32).eval()
    tokens = torch.arange(3, 23)[None]
    wanted = LlambaForCausalLM.load(str(distilled)).eval().backbone(tokens).last_hidden_state
    assert torch.equal(backbone(tokens).last_hidden_state, wanted)
