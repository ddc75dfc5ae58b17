"""The same method in TRL's GRPOTrainer, for several cards or machines, and for LoRA.

    python .lab/trl/trainer.py                                        # one process, the toy
    torchrun --nproc-per-node 2 .lab/trl/trainer.py --device cpu      # two
    torchrun --nproc-per-node 8 .lab/trl/trainer.py --model Qwen/Qwen3-1.7B --env alfworld ...

Flags are those of sdar.py; every field of TRL's GRPOConfig can be set, too, with --set NAME=VALUE.
TRL brings accelerate (DDP, FSDP, DeepSpeed) and PEFT. From sdar.py come the episodes, what is known
of them before the update, and the gated loss. At the end --out has checkpoint/, which sdar.py
loads, and TRL's log as metrics.jsonl.

What is another than in sdar.py: the KL is not clamped; weight decay spares biases and norms; with
several optimiser steps a batch each divides by the mean number of tokens of a step (there by its
own), so that neither processes nor accumulation change the gradient.
"""

import copy
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import sdar

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError:  # main says so
    GRPOTrainer = object

TESTED = {"trl": "1.16.0", "peft": "0.21.2"}  # the versions that were tested
NOT_HERE = {"resume", "save_every", "eval_every"}  # of ours; and of GRPOConfig:
NOT_HERE |= {"use_vllm", "off_policy_mask_threshold"}  # they need the sampler's log-probs


def check_version(name):
    """UserError if a package is missing; a line if it is not the one that was tested."""
    tested = f"{name}=={TESTED[name]}"
    with sdar.naming(f"pip install {tested}", sdar.UserError):
        installed = version(name)
    if installed != TESTED[name]:
        print(f"{name} {installed} was not tested, {tested} was", file=sys.stderr)


def make_arguments(config, changes):
    """TRL's GRPOConfig. changes: texts NAME=VALUE, which win. UserError for what it refuses."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    tasks, parts = config.tasks_per_step, config.minibatches
    share, rest = divmod(tasks * config.group_size, processes * parts)
    fits = rest == 0 and tasks % processes == 0
    sdar.require(fits, f"{tasks} tasks do not fit {processes} processes, {parts} --minibatches")
    name = "activation_checkpointing"  # transformers 5.24 renamed it
    name = name if hasattr(GRPOConfig, name) else "gradient_checkpointing"
    given = {
        "output_dir": config.out,
        "seed": config.seed,
        "max_steps": config.steps * parts,
        "steps_per_generation": parts,
        "per_device_train_batch_size": share,
        "num_generations": config.group_size,
        "temperature": config.temperature,
        "scale_rewards": "none",  # they are advantages already
        "reward_weights": [config.policy_coef],
        "epsilon": config.clip_eps,
        "beta": config.kl_coef,
        "use_bias_correction_kl": False,  # which multiplies it by the ratio
        "loss_type": "dapo",  # one mean over the tokens of all processes
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": config.grad_clip,
        "bf16": config.dtype == "bfloat16",
        "use_cpu": config.device == "cpu",
        "save_strategy": "no",
        "logging_steps": parts,
        name: config.gradient_checkpointing,
    }
    for change in changes:
        name, equals, value = change.partition("=")
        sdar.require(equals, f"--set {change}: must be NAME=VALUE")
        sdar.require(name not in NOT_HERE, f"--set {name}: not on TRL with sdar.py")
        try:
            given[name] = json.loads(value)
        except ValueError:  # a word
            given[name] = value
    with sdar.naming("TRL's GRPOConfig", sdar.UserError):
        return GRPOConfig(**given)


class SDARTrainer(GRPOTrainer):
    """GRPO with sdar.py's episodes and the gated term. What it uses of TRL is documented:
    rollout_func, compute_loss, log; and of PyTorch, a forward hook."""

    rollout = staticmethod(sdar.rollout)  # a place for another engine

    def __init__(self, config, changes=(), lora=0):
        """lora: the rank of adapters; 0: none."""
        from datasets import Dataset

        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # the warning of rollout_func
        arguments = make_arguments(config, changes)
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self.run, self.lora = config, lora
        self.envs = sdar.make_envs(config)
        self.policy, self.chat = sdar.load_policy(config)  # inside of what TRL makes of it
        tokenizer = self.chat.tokenizer
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tasks = self.envs[0].tasks("train")
        tasks = tasks * -(-config.tasks_per_step // len(tasks))  # TRL draws a row once

        adapters = None
        if lora:
            from peft import LoraConfig

            adapters = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear")
        copied = config.teacher == "frozen" and not lora
        self.teacher = copy.deepcopy(self.policy) if copied else self.policy
        self.sums = {}  # of the gated term's values since the last line of the log
        super().__init__(
            self.policy,
            advantage,
            arguments,
            train_dataset=Dataset.from_dict({"prompt": tasks}),
            processing_class=tokenizer,
            peft_config=adapters,
            rollout_func=play,
        )

    def score(self, model, episodes, config, with_skill=False):
        """As sdar.score. With LoRA the frozen teacher is the policy with its adapters off."""
        off = nullcontext()
        if self.lora and with_skill and config.teacher == "frozen":
            off = self.accelerator.unwrap_model(self.model).disable_adapter()
        with off:
            return sdar.score(model, episodes, config, with_skill)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, and lambda times the gated term on the log-probs that it computed."""
        outputs = []
        hook = model.register_forward_hook(lambda _, args, output: outputs.append(output))
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hook.remove()
        if self.run.distil == "none":
            return loss

        terms = gated_terms(outputs[0], inputs, self.run)
        for name, values in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + values.detach().float().sum()

        # Tokens of an optimiser step in one process, on average: what dapo divides by.
        part = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes * part
        return loss + self.run.sdar_coef * terms["sdar_loss"].sum() / tokens

    def log(self, logs, start_time=None):
        """With the gated term's means over the tokens of all processes."""
        sums = self.accelerator.reduce(self.sums, "sum")
        tokens = sums.pop("tokens", None)
        for name, total in sums.items():
            logs[name] = (total / tokens).item()
        self.sums = {}
        super().log(logs, start_time)


def gated_terms(output, inputs, config):
    """L_SDAR of a micro-batch: sdar_loss's values, each (N,), with "gap" and, 1 each, "tokens".

    output: of the model, log_probs and entropy, each (B, at least C), the last C columns of the
    completions. inputs: TRL's batch, each (B, C); a sampled token has both masks 1. Where the batch
    names the sampler's log-probs, it has the teacher's."""
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    width = mask.shape[1]
    logprobs, entropy = output.log_probs[:, -width:][mask], output.entropy[:, -width:][mask]
    teacher = inputs["sampling_per_token_logps"][mask]
    old = inputs["old_per_token_logps"][mask] if "old_per_token_logps" in inputs else logprobs
    terms = sdar.sdar_loss(logprobs, teacher, entropy, config.gate, config.gate_beta)
    return terms | {"gap": teacher - old, "tokens": torch.ones_like(teacher)}


def advantage(advantages, won, log_metric, **rest):
    """TRL's reward function. TRL takes the group's mean off, which is 0."""
    log_metric("success", float(np.mean(won)))
    return advantages


def play(prompts, trainer):
    """TRL's rollout function: an episode for each prompt, a task's id. Returns lists: {name: a
    value for each}."""
    config, policy, step = trainer.run, trainer.policy, trainer.state.global_step
    starts = []
    for i, task in enumerate(prompts, trainer.accelerator.process_index * len(prompts)):
        group = i // config.group_size  # its episodes begin alike
        rng = np.random.default_rng([2, config.seed, step, group])
        starts.append((task, int(rng.integers(10**6)), (3, config.seed, step, i)))

    training = policy.training
    policy.eval()
    more = starts, config, config.temperature, config.skilled
    episodes = trainer.rollout(policy, trainer.chat, trainer.envs, *more)
    known = replace(config, kl_coef=0.0)  # TRL itself scores the start policy
    batch = sdar.step_batch(policy, None, trainer.teacher, episodes, known, step, trainer.score)
    policy.train(training)

    # TRL pads, shuffles and splits, and a number a token goes along: the sampler's log-prob, which
    # it needs for vLLM alone. The teacher's takes its place. A prompt ends at the first sampled id.
    lengths = [len(episode.logprobs) for episode in episodes]
    teacher = batch.get("teacher", batch["old"]).cpu().split(lengths)
    advantages = batch["advantages"].split(lengths)
    rows = []
    for episode, of_teacher, of_group in zip(episodes, teacher, advantages):
        first = episode.mask.index(1)
        mask = torch.tensor(episode.mask[first:])
        row = {"prompt_ids": episode.ids[:first], "completion_ids": episode.ids[first:]}
        row |= {"env_mask": mask.tolist(), "advantages": of_group[0].item(), "won": episode.won}
        row["logprobs"] = torch.zeros(len(mask)).masked_scatter(mask > 0, of_teacher).tolist()
        rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


def train(config, changes, lora):
    """Train, evaluate, and write what sdar.py loads."""
    check_version("trl")
    if lora:
        check_version("peft")
    sdar.require(config.distil in ("gate", "none"), f"--method {config.method}: not on TRL")
    sdar.require(config.steps, "--steps 0: sdar.py evaluates, this trains")
    sdar.require(lora >= 0, f"--lora {lora}: must be a rank, or 0")
    sdar.load_checkpoint(config, None, None, None)  # asks whether --out may be written

    trainer = SDARTrainer(config, changes, lora)
    trainer.train()
    if trainer.accelerator.is_main_process:
        policy, chat = trainer.policy.eval(), trainer.chat
        if lora:
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        sdar.say_success("after", sdar.evaluate(policy, chat, trainer.envs, config))
        policy.save_pretrained(Path(config.out, "checkpoint"))
        chat.tokenizer.save_pretrained(Path(config.out, "checkpoint"))
        log = [json.dumps(row) + "\n" for row in trainer.state.log_history]
        Path(config.out, "metrics.jsonl").write_text("".join(log), "utf-8")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def main(argv):
    """Train as a command line says. Returns the exit code."""

    def command():
        usage = "python .lab/trl/trainer.py [flags]"
        parser = sdar.make_parser(usage=usage, description=__doc__)
        parser.add_argument("--lora", type=int, default=0, help="rank of LoRA's adapters [0: none]")
        parser.add_argument("--set", action="append", default=[], help="NAME=VALUE of GRPOConfig")
        given = {"out": "runs/trl", **vars(parser.parse_args(argv))}
        lora, changes = given.pop("lora"), given.pop("set")
        for name in NOT_HERE & {*given}:
            raise sdar.UserError(f"{sdar.flag(name)}: not on TRL")
        train(sdar.configure(**given), changes, lora)

    return sdar.run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
