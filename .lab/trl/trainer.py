"""The same method in TRL's GRPOTrainer, for several GPUs or machines, and for LoRA.

    python .lab/trl_trainer.py --out runs/trl                                      # one process
    torchrun --nproc-per-node 2 .lab/trl_trainer.py --device cpu --out runs/trl    # two
    torchrun --nproc-per-node 8 .lab/trl_trainer.py --model Qwen/Qwen3-1.7B --env alfworld ...

Flags are those of sdar.py; every field of TRL's GRPOConfig can be set, too, with --set NAME=VALUE.
TRL brings accelerate (DDP, FSDP, DeepSpeed) and PEFT. From sdar.py come the episodes, the teacher's
log-probs and the gated loss.

What is another than in sdar.py's update: advantages are divided by std + 1e-4 (there 1e-6); the KL
is not clamped; with several optimiser steps a batch each divides by the mean number of tokens of a
step (there by its own), so that neither processes nor accumulation change the gradient.
"""

import copy
import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import sdar

try:
    from trl import GRPOTrainer
except ImportError:  # main says so
    GRPOTrainer = object

TESTED = {"trl": "1.16.0", "peft": "0.21.2"}  # the versions this was tested with
METHODS = ("grpo", "sdar", "opsd", "grpo_opsd")
GATES = ("gap", "entropy", "soft_or", "none")
TEACHERS = ("live", "frozen")
OWN = (
    ("--lora", {"type": int, "help": "rank of LoRA's adapters, through PEFT; 0: train all [0]"}),
    ("--vllm", {"help": "address of a `trl vllm-serve`, which then samples"}),
    ("--set", {"action": "append", "help": "NAME=VALUE of TRL's GRPOConfig; may be repeated"}),
)
SETTINGS = {  # {field of our Config: field of GRPOConfig}; the others are set in settings()
    "seed": "seed",
    "lr": "learning_rate",
    "clip_eps": "epsilon",
    "kl_coef": "beta",
    "entropy_coef": "entropy_coef",
    "temperature": "temperature",
    "grad_clip": "max_grad_norm",
    "group_size": "num_generations",
    "minibatches": "steps_per_generation",
    "gradient_checkpointing": "gradient_checkpointing",
}
NOT_HERE = {"anyway", "overwrite", "resume", "save_every", "eval_every", "rollout_batch", "kernel"}
NOT_HERE |= {
    "micro_tokens",
    "turn_weights",
    "teacher_refresh",
    "rlsd_decay",
    "distil",
    "divergence",
}


def settings(config, changes, processes, known):
    """The arguments of GRPOConfig. changes: NAME=VALUE texts, which win; known: its fields."""
    episodes = config.tasks_per_step * config.group_size
    share, rest = divmod(episodes, processes * config.minibatches)
    fits = not rest and share and config.tasks_per_step % processes == 0
    sdar.require(
        fits,
        f"{config.tasks_per_step} tasks of {config.group_size} episodes cannot be shared by "
        f"{processes} processes in {config.minibatches} --minibatches",
    )
    given = {theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()}
    given |= {
        "output_dir": config.out,
        "max_steps": config.steps * config.minibatches,
        "per_device_train_batch_size": share,
        "delta": config.dual_clip or None,
        "scale_rewards": "group" if config.normalize_std else "none",
        "loss_type": "dapo",  # one mean over the tokens of all processes
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,  # as sdar.py's AdamW
        "bf16": config.dtype == "bfloat16",
        "use_cpu": config.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": config.minibatches,
        "disable_tqdm": True,
    }
    if "activation_checkpointing" in known:  # its new name in transformers 5.24
        given["activation_checkpointing"] = given.pop("gradient_checkpointing")
    for change in changes:
        name, equals, value = change.partition("=")
        sdar.require(equals, f"--set {change}: NAME=VALUE")
        try:
            given[name] = json.loads(value)
        except ValueError:  # a word
            given[name] = value
    return given


def make_trainer(config, changes=(), lora=0, vllm="", kind=None):
    """An SDARTrainer, or another kind of it, for a Config. UserError for settings that TRL
    refuses."""
    import datasets
    from trl import GRPOConfig

    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    if chat.tokenizer.pad_token_id is None:
        chat.tokenizer.pad_token = chat.tokenizer.eos_token
    known = {field.name for field in sdar.fields(GRPOConfig)}
    given = settings(config, changes, int(os.environ.get("WORLD_SIZE", "1")), known)
    if vllm:
        given |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": vllm}
    try:
        arguments = GRPOConfig(**given)
    except (TypeError, ValueError) as error:
        raise sdar.UserError(f"TRL's GRPOConfig: {str(error).splitlines()[0]}") from error
    adapters = None
    if lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear")
    tasks = datasets.Dataset.from_dict({"prompt": envs[0].tasks("train")})
    kind = kind or SDARTrainer
    return kind(config, chat, envs, model, arguments, tasks, adapters)


class SDARTrainer(GRPOTrainer):
    """GRPO with sdar.py's episodes and the gated term. All that it uses of TRL is documented:
    rollout_func, compute_loss, log; and of PyTorch, a forward hook."""

    def __init__(self, config, chat, envs, model, arguments, tasks, adapters):
        self.run, self.chat, self.envs = config, chat, envs
        self.method = sdar.METHODS[config.method]
        self.scored = {}  # {ids of an episode: the teacher's log-probs of what follows them}
        self.noted = []  # stats of the gated term since the last line of the log
        super().__init__(
            model,
            score_of_episode,
            arguments,
            train_dataset=tasks,
            processing_class=chat.tokenizer,
            peft_config=adapters,
            rollout_func=play,
        )
        # The start's weights: LoRA's are the base model's, with the adapters off.
        self.frozen = None
        if config.teacher == "frozen" and not adapters:
            self.frozen = copy.deepcopy(self.policy())

    def policy(self):
        """The transformers model inside of what accelerate and PEFT make of it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def as_teacher(self):
        """(the teacher's model, a context in which it is one)."""
        off = nullcontext()
        if self.run.teacher == "frozen" and not self.frozen:
            off = self.accelerator.unwrap_model(self.model).disable_adapter()
        return self.frozen or self.policy(), off

    def begin_step(self, starts, stream):
        """Called before a step's episodes are played; for a trainer that notes them."""

    def sampler_class(self):
        """What samples: our Sampler, or TRL's client of a vLLM server, whose weights TRL keeps up
        to date."""
        if not self.args.use_vllm:
            return None
        return partial(VllmSampler, self.vllm_generation.vllm_client, self.chat)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, and lambda times the gated term on the log-probs that it computed."""
        outputs = []
        hook = model.register_forward_hook(lambda _, args, output: outputs.append(output))
        if not self.method.policy_weight:
            inputs = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hook.remove()
        if not self.method.teacher:
            return loss

        distil, stats = gated_term(self, outputs, inputs)
        self.noted.append(stats)
        return loss + self.run.sdar_coef * distil

    def tokens_a_step(self, inputs):
        """Tokens of an optimiser step in one process, on average: what TRL's dapo divides by."""
        steps = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return inputs["num_items_in_batch"] / self.accelerator.num_processes * steps

    def log(self, logs, start_time=None):
        """With the means over the tokens of what was noted."""
        tokens = sum(stats["tokens"] for stats in self.noted) or 1
        for name in self.noted[0] if self.noted else ():
            total = sum(stats[name] * stats["tokens"] for stats in self.noted)
            logs[f"sdar/{name}"] = total / tokens
        logs.pop("sdar/tokens", None)
        self.noted = []
        super().log(logs, start_time)


def gated_term(trainer, outputs, inputs):
    """L_SDAR of a micro-batch, so divided that the parts of an optimiser step add up to its mean
    over tokens, as TRL divides its own loss; and stats, with how many tokens there were.

    outputs: what the model returned for the parts of the micro-batch, with log_probs and entropy,
    each (rows, at least C), the last C of them of the completion. inputs: TRL's batch: prompt_ids,
    prompt_mask (B, P), completion_ids, completion_mask, tool_mask (B, C); a sampled token has both
    masks 1. trainer.scored: {ids of an episode: the teacher's log-probs of its completion, or None
    where it reads no skill}."""
    ids = inputs["completion_ids"]
    width = ids.shape[1]
    logprobs = torch.cat([output.log_probs[:, -width:] for output in outputs])
    entropy = torch.cat([output.entropy[:, -width:] for output in outputs])
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).float()

    teacher = torch.zeros_like(logprobs)
    rows = zip(inputs["prompt_ids"], inputs["prompt_mask"], ids, inputs["completion_mask"])
    for row, (prompt, real_prompt, answer, real) in enumerate(rows):
        key = (*prompt[real_prompt > 0].tolist(), *answer[real > 0].tolist())
        scored = trainer.scored[key]
        if scored is None:  # no skill, no teacher: its gap is 0
            scored = logprobs[row, : int(real.sum())].detach()
        teacher[row, : len(scored)] = scored

    config, tokens = trainer.run, mask.sum().item()
    distil, stats = sdar.sdar_loss(logprobs, teacher, mask, config.gate, config.gate_beta, entropy)
    stats |= {"loss": distil.item(), "tokens": tokens}
    return distil * tokens / trainer.tokens_a_step(inputs), stats


class VllmSampler:
    """sdar.Sampler's methods, by TRL's client of a vLLM server. Each turn sends the conversations
    so far; the server's prefix cache knows their beginnings. Not run on a card: tested against a
    stand-in of the client."""

    def __init__(self, client, chat, model, temperature):
        self.client, self.chat = client, chat
        self.model, self.temperature = model, temperature
        self.conversations = None

    def feed_rows(self, rows):
        """Append to each conversation its list of new ids."""
        before = self.conversations or [[] for _ in rows]
        self.conversations = [old + new for old, new in zip(before, rows)]

    def respond(self, uniforms, stop_ids, stop_text=None):
        """Sample a response to each conversation: [(ids, log-probs)], lists."""
        options = {"stop_token_ids": list(stop_ids), "skip_special_tokens": False}
        answer = self.client.generate(
            self.conversations,
            temperature=self.temperature,
            max_tokens=uniforms.shape[1],
            generation_kwargs=options,
        )
        found = []
        for row, (ids, logprobs) in enumerate(zip(answer["completion_ids"], answer["logprobs"])):
            length = len(ids)
            for end in range(1, len(ids)):  # where a tag is closed the response ends
                if stop_text and stop_text(torch.tensor([ids[:end]]), None).any():
                    length = end
                    break
            flat = [value[0] if isinstance(value, list) else value for value in logprobs]
            found.append((ids[:length], flat[:length]))
            self.conversations[row] += ids[: length - 1]  # the last one comes with what follows it
        return found

    def keep(self, rows):
        """The batch becomes these rows of it."""
        self.conversations = [self.conversations[row] for row in rows]


def score_of_episode(prompts, completions, score, **rest):
    """The reward function: what play returned."""
    return score


def play(prompts, trainer):
    """TRL's rollout function: an episode for each prompt, a task's id, and the teacher's log-probs
    of it, with the weights before a step's first update."""
    config, policy = trainer.run, trainer.policy()
    group = config.group_size
    step = trainer.state.global_step
    starts = []
    for number, task in enumerate(prompts):  # a group stands together: one seed
        draw = np.random.default_rng([*f"{task}/{step}".encode(errors="replace")])
        starts.append((task, int(draw.integers(10**6)), number // group))

    was_training = policy.training
    policy.eval()
    stream = (3, config.seed, step)
    trainer.begin_step(starts, stream)
    own = (policy, trainer.chat, trainer.envs, starts, config)
    episodes = sdar.rollout(
        *own,
        stream=stream,
        temperature=config.temperature,
        first=trainer.accelerator.process_index * len(prompts),
        sampler_class=trainer.sampler_class(),
    )
    sdar.require(len(episodes) == len(starts), "an episode failed", sdar.EnvUnavailable)
    teacher, off = trainer.as_teacher()
    teacher.eval()
    scores = None
    if trainer.method.teacher:
        with off:
            scores = sdar.score(teacher, episodes, config, with_skill=True)
    policy.train(was_training)
    return rows_of(trainer, episodes, scores, config)


def rows_of(trainer, episodes, scores, config):
    """What TRL wants of episodes: lists of ids, masks and log-probs; it cuts at the first sampled
    id. The teacher's log-probs are kept by the ids, since TRL shuffles and splits the rows."""
    trainer.scored = {}
    rows = {name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "score")}
    for i, episode in enumerate(episodes):
        first = episode.mask.index(1)
        mask = episode.mask[first:]
        last = max(place for place, sampled in enumerate(mask) if sampled) + 1
        mask = torch.tensor(mask[:last])
        logprobs = torch.zeros(last).masked_scatter(mask > 0, torch.tensor(episode.logprobs))
        rows["prompt_ids"].append(episode.ids[:first])
        rows["completion_ids"].append(episode.ids[first:][:last])
        rows["logprobs"].append(logprobs.tolist())
        rows["env_mask"].append(mask.tolist())
        rows["score"].append(sdar.total_score(episode, config))

        key = (*episode.ids[: first + last],)
        trainer.scored[key] = None
        if scores is not None and episode.skill_ids:
            own = scores[i, : int(mask.sum())].float().cpu()
            filled = torch.zeros(last).masked_scatter(mask > 0, own)
            trainer.scored[key] = filled.to(scores.device)
    return rows


def check_packages(names):
    """UserError if one is missing; a line if it is not of the tested version."""
    for name in names:
        try:
            installed = version(name)
        except PackageNotFoundError:
            raise sdar.UserError(f"{name} is missing: pip install {name}") from None
        if installed != TESTED[name]:
            sdar.say(f"{name} {installed} is untested here (tested: {TESTED[name]})")


def main(argv):
    """Train, evaluate, and save a checkpoint that sdar.py loads."""
    typed = sdar.parse_flags("trl", __doc__, argv, OWN, NOT_HERE)
    lora, vllm, changes = typed.pop("lora", 0), typed.pop("vllm", ""), typed.pop("set", [])
    config = sdar.Config(**{"out": "runs/trl", **typed})
    for name, known in (("method", METHODS), ("gate", GATES), ("teacher", TEACHERS)):
        value = getattr(config, name)
        sdar.require(value in known, sdar.unknown(f"{sdar.flag(name)} on TRL", value, known))
    sdar.require(lora >= 0, f"--lora {lora}: a rank, or 0")
    sdar.check_out(config)
    check_packages(("trl", "peft") if lora else ("trl",))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func's warning

    trainer = make_trainer(config, changes, lora, vllm)
    trainer.train()
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if lora:
            model = model.merge_and_unload()
        result = sdar.evaluate(model.eval(), trainer.chat, trainer.envs, config)
        sdar.print_success("after", result)
        folder = Path(config.out, "checkpoint")
        model.save_pretrained(folder)
        trainer.chat.tokenizer.save_pretrained(folder)
        log = "".join(json.dumps(row) + "\n" for row in trainer.state.log_history)
        sdar.write_whole(Path(config.out, "trl.jsonl"), log)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def run(argv):
    """main, with bad input as one line. Returns the exit code."""
    try:
        main(argv)
    except (sdar.UserError, sdar.EnvUnavailable, sdar.argparse.ArgumentError, OSError) as error:
        print(f"trl_trainer.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
