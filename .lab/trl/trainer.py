"""The same method in TRL's GRPOTrainer, for several cards or machines, and for LoRA.

    python .lab/trl/trainer.py                                        # one process, the toy
    torchrun --nproc-per-node 2 .lab/trl/trainer.py --device cpu      # two
    torchrun --nproc-per-node 8 .lab/trl/trainer.py --model Qwen/Qwen3-1.7B --env alfworld ...

Flags are those of sdar.py; most fields of TRL's GRPOConfig can be set, too, with --set NAME=VALUE.
TRL brings accelerate (DDP, FSDP, DeepSpeed) and PEFT. From sdar.py come the episodes, what is known
of them before the update, and the gated loss. At the end --out has checkpoint/, which sdar.py
loads, and TRL's log as metrics.jsonl.

What differs from sdar.py: the KL is not clamped; weight decay spares biases and norms; with several
optimiser steps per batch each divides by their mean number of tokens (in sdar.py by its own), so
that neither processes nor accumulation change the gradient. --micro-batch cuts scoring alone: an
optimiser step's share of episodes is one pass, unless --set per_device_train_batch_size,
gradient_accumulation_steps and steps_per_generation cut it.
"""

import copy
import json
import os
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import sdar
from envs import naming, require

try:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer
except ImportError:  # make_arguments says so
    GRPOTrainer = object

# Settings of ours that are not there; and of GRPOConfig, that need the sampler's log-probs.
NOT_HERE = {"resume", "save_every", "eval_every", "use_vllm", "off_policy_mask_threshold"}

# TRL's names of our settings.
NAMES = """output_dir=out seed=seed num_generations=group_size temperature=temperature
    epsilon=clip_eps beta=kl_coef learning_rate=lr max_grad_norm=grad_clip logging_steps=minibatches
    gradient_checkpointing=gradient_checkpointing steps_per_generation=minibatches"""

# What TRL gets are advantages already, not rewards to scale. dapo is one mean over the tokens of
# all processes. The bias correction would multiply the KL by the ratio.
FIXED = """scale_rewards=none loss_type=dapo use_bias_correction_kl=false weight_decay=0.01
    lr_scheduler_type=constant save_strategy=no"""


def make_arguments(config, changes):
    """TRL's GRPOConfig. changes: texts NAME=VALUE, which win. UserError for what it refuses."""
    require(GRPOTrainer is not object, "pip install trl==1.16.0 peft==0.21.2")  # as tested
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    tasks = config.tasks_per_step
    share, rest = divmod(tasks * config.group_size, processes * config.minibatches)
    message = f"{tasks} tasks do not fit {processes} processes, {config.minibatches} --minibatches"
    require(not rest and tasks % processes == 0, message)
    given = {
        "max_steps": config.steps * config.minibatches,
        "per_device_train_batch_size": share,
        "reward_weights": [config.policy_coef],
        "bf16": config.dtype == "bfloat16",
        "use_cpu": config.device == "cpu",
    }
    for pair in NAMES.split():
        theirs, ours = pair.split("=")
        given[theirs] = getattr(config, ours)
    for change in [*FIXED.split(), *changes]:
        name, equals, value = change.partition("=")
        require(equals, f"--set {change}: must be NAME=VALUE")
        require(name not in NOT_HERE, f"--set {name}: not on TRL with sdar.py")
        with suppress(ValueError):  # a word stays one
            value = json.loads(value)
        given[name] = value
    with naming("TRL's GRPOConfig"):
        return GRPOConfig(**given)


class SDARTrainer(GRPOTrainer):
    """GRPO with sdar.py's episodes and the gated term. It uses TRL's rollout_func (which TRL calls
    experimental), compute_loss, log and names of a batch; and of PyTorch, a forward hook."""

    rollout = staticmethod(sdar.rollout)  # a place for another engine

    def __init__(self, config, arguments, lora=0, step_batch=sdar.step_batch):
        """arguments: TRL's. lora: the rank of adapters; 0: none. step_batch: as train's."""
        self.run = replace(config, kl_coef=0.0)  # TRL itself scores the start policy
        self.lora = lora
        self.step_batch = step_batch
        self.envs = sdar.make_envs(config)
        self.policy, self.chat = sdar.load_policy(config)  # inside of what TRL makes of it
        self.played = 0  # batches of episodes
        self.sums = Counter()  # of the gated term's values since the last line of the log

        adapters = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear")
        with naming("TRL's GRPOTrainer"):  # several cards, no torchrun, say
            super().__init__(
                self.policy,
                advantage,
                arguments,
                train_dataset=Dataset.from_dict({"prompt": ["see play"] * config.tasks_per_step}),
                processing_class=self.chat.tokenizer,
                rollout_func=play,
                peft_config=adapters if lora else None,
            )
        copied = config.teacher == "frozen" and not lora
        self.teacher = copy.deepcopy(self.policy) if copied else self.policy

    def score(self, model, episodes, config, with_skill=False):
        """As sdar.score. With LoRA the frozen teacher is the policy with its adapters off."""
        off = self.lora and with_skill and config.teacher == "frozen"
        with self.accelerator.unwrap_model(self.model).disable_adapter() if off else nullcontext():
            return sdar.score(model, episodes, config, with_skill)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, and lambda times the gated term on the log-probs that it computed."""
        outputs = []
        with model.register_forward_hook(lambda _, args, output: outputs.append(output)):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.run.distil == "none":
            return loss

        terms = gated_terms(outputs[0], inputs, self.run)
        for name, values in terms.items():
            self.sums[name] += values.detach().sum()

        # Tokens of an optimiser step in one process, on average: what dapo divides by.
        part = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes * part
        return loss + self.run.sdar_coef * terms["sdar_loss"].sum() / tokens

    def log(self, logs, start_time=None):
        """With the gated term's means over the tokens of all processes."""
        sums = self.accelerator.reduce(self.sums, "sum")
        self.sums = Counter()
        tokens = sums.pop("tokens", None)
        means = {name: (total / tokens).item() for name, total in sums.items()}
        super().log(logs | means, start_time)

    def finish(self):
        """Evaluate, and write checkpoint/, with LoRA's adapters merged, and metrics.jsonl."""
        policy = self.policy.eval()
        vars(policy).pop("forward", None)  # see play
        folder = Path(self.run.out)
        if self.lora:
            self.accelerator.unwrap_model(self.model).merge_and_unload()
        for old in ("state.pt", "config.json"):  # of an sdar.py run that is replaced
            (folder / old).unlink(missing_ok=True)
        policy.save_pretrained(folder / "checkpoint")
        self.chat.tokenizer.save_pretrained(folder / "checkpoint")
        log = [json.dumps(row) + "\n" for row in self.state.log_history]
        (folder / "metrics.jsonl").write_text("".join(log), "utf-8")
        sdar.say_success("after", sdar.evaluate(policy, self.chat, self.envs, self.run))


def gated_terms(output, inputs, config):
    """L_SDAR of a micro-batch: sdar_loss's values, each (N,), with "gap" and, 1 each, "tokens".

    output: of the model, log_probs and entropy, each (B, at least C), the last C columns of the
    completions. inputs: TRL's batch, each (B, C); a sampled token has both masks 1. Where the batch
    names the sampler's log-probs, it has the teacher's."""
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    width = mask.shape[1]
    logprobs = output.log_probs[:, -width:][mask]
    entropy = output.entropy[:, -width:][mask]
    teacher = inputs["sampling_per_token_logps"][mask]
    old = inputs["old_per_token_logps"][mask] if "old_per_token_logps" in inputs else logprobs
    terms = sdar.sdar_loss(logprobs, teacher, entropy, config.gate, config.gate_beta)
    return terms | {"gap": teacher - old, "tokens": torch.ones_like(teacher)}


def advantage(advantages, won, log_metric, **rest):
    """TRL's reward function. TRL takes the group's mean off, which is 0."""
    log_metric("success", float(np.mean(won)))
    return advantages


def play(prompts, trainer):
    """TRL's rollout function: an episode for each prompt. Tasks are drawn as in sdar.py, and this
    process plays its part of them. Returns lists: {name: a value for each}."""
    trainer.played += 1
    step = trainer.played
    config = trainer.run
    policy = trainer.policy
    rng = np.random.default_rng([2, config.seed, step])
    starts = sdar.draw_starts(trainer.envs[0], config, step, rng)
    starts = sdar.in_parts(starts, len(prompts))[trainer.accelerator.process_index]

    # TRL and accelerate bind a forward to the model. A copy's would still run this one: rollout
    # would play from it, not from its bfloat16 copy.
    policy.eval()
    bound = vars(policy).pop("forward", None)
    more = starts, config, config.temperature, config.skilled
    episodes = trainer.rollout(policy, trainer.chat, trainer.envs, *more)
    if bound:
        policy.forward = bound
    models = policy, None, trainer.teacher
    batch = trainer.step_batch(*models, episodes, config, step, trainer.score)
    policy.train()

    # TRL pads, shuffles and splits, and a number a token goes along: the sampler's log-prob, which
    # it needs for vLLM alone. The teacher's takes its place. A prompt ends at the first sampled id.
    teacher = iter(batch.get("teacher", batch["old"]).tolist())
    lengths = [len(episode.logprobs) for episode in episodes]
    rows = []
    for episode, advantages in zip(episodes, batch["advantages"].split(lengths)):
        at = episode.mask.index(1)
        row = {
            "prompt_ids": episode.ids[:at],
            "completion_ids": episode.ids[at:],
            "env_mask": episode.mask[at:],
            "logprobs": [next(teacher) if sampled else 0.0 for sampled in episode.mask[at:]],
            "advantages": advantages[0].item(),
            "won": episode.won,
        }
        rows.append(row)
    return {name: [row[name] for row in rows] for name in row}


def main(argv=None):
    """Train as a command line says, evaluate, and write what sdar.py loads."""
    parser = sdar.make_parser("python .lab/trl/trainer.py [flags]", description=__doc__)
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA's adapters [0: none]")
    parser.add_argument(
        "--set", action="append", default=[], help="NAME=JSON of GRPOConfig; false, not False"
    )
    given = {"out": "runs/trl", **vars(parser.parse_args(argv))}
    lora = given.pop("lora")
    changes = given.pop("set")
    require(not NOT_HERE & {*given}, "--resume, --save-every, --eval-every: not on TRL")
    config = sdar.configure(**given)
    require(config.distil in ("gate", "none"), f"--method {config.method}: not on TRL")
    require(config.steps, "--steps 0: sdar.py evaluates, this trains")
    require(lora >= 0, f"--lora {lora}: must be a rank, or 0")
    arguments = make_arguments(config, changes)
    sdar.load_checkpoint(config, None, None, None)  # asks whether --out may be written

    trainer = SDARTrainer(config, arguments, lora)
    trainer.train()
    if trainer.accelerator.is_main_process:
        trainer.finish()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    sys.exit(sdar.run(main))
