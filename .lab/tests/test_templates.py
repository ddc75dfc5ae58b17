"""Chat templates of many families, those that TRL carries, and some with a fault: what the policy
reads is the template's own text, or the model is refused with the reason."""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from pytest import mark, raises
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sdar

found = find_spec("trl")
FOLDER = Path(found.origin).parent / "chat_templates" if found else Path("there is no TRL")
CONTROL = re.compile(r"<[|｜]?[^<>{}'\s]+>|\[gMASK\]")  # what a family's tokenizer has as one token
TALK = ["A mug: where?", "<action>go</action>", "Nothing.\nTurn 2.", "look", "Done?"]
REFUSED = {  # {family: why}; all others are read as they are written
    "gemma": "System role not supported",
    "glm4moe": "frames a second turn otherwise",  # a blank between thought and answer, or none
    "gptoss": "frames a second turn otherwise",  # it names a channel, which the policy would write
    "muse_glimmer": "frames a second turn otherwise",  # likewise
    "idefics3": "moves, repeats or drops a message",  # pictures: a message is a list of parts
    "smolvlm": "moves, repeats or drops a message",
    "llava_next": "has no attribute 'text'",
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_with(template):
    """A byte-level tokenizer without merges, which has the template's control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=sorted({*CONTROL.findall(template)}),
    )
    tokenizer.chat_template = template
    return tokenizer


def read_and_rendered(template, examples):
    """Three turns of a conversation: as the policy reads each, and as the template writes it."""
    tokenizer = tokenizer_with(template)
    chat = sdar.Chat(tokenizer)
    world = SimpleNamespace(instructions="Play a game.\nBe brief.", examples=examples)
    ids, _ = chat.first(world, TALK[0])
    read = [tokenizer.decode(ids)]
    for answer, prompt in zip(TALK[1::2], TALK[2::2]):
        ids = ids + chat.encode(answer) + chat.next(prompt, last_id=-1)
        read.append(tokenizer.decode(ids))

    texts, rendered = [*sum(examples, ()), *TALK], []
    messages = [{"role": "system", "content": world.instructions}]
    for number, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[number % 2], "content": text})
    for end in (-4, -2, None):
        text = tokenizer.apply_chat_template(
            messages[:end], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        rendered.append(text)
    return read, rendered


def without(text):
    """A text but for the thought in front of an answer, which many templates drop from turns that
    are over, and of which the policy has read each; and but for the day."""
    text = re.sub(r"<think>\n(\n</think>\n\n)?", "", text)
    return re.sub(r"\d\d \w{3} 20\d\d", "(a day)", text)


@mark.skipif(not found, reason="TRL carries the templates")
@mark.parametrize("family", sorted(path.stem for path in FOLDER.glob("*.jinja")))
def test_a_family_is_read_as_its_template_writes_it_or_is_refused(family):
    template = (FOLDER / f"{family}.jinja").read_text("utf-8")
    reason = REFUSED.get(family.removesuffix("_training"))
    if reason:
        with raises(Exception, match=reason):
            read_and_rendered(template, ())
        return
    for examples in ((), (("A cup?", "take"),)):
        for read, rendered in zip(*read_and_rendered(template, examples)):
            assert without(read) == without(rendered)
            assert read[-20:] == rendered[-20:]  # the thought that is to come


HARMLESS = {  # {what a template does: what becomes of m.content, or all of it}
    "trims": "m.content | trim",
    "a default system message, too": "<|im_start|>system\nHelp.<|im_end|>\n" + CHATML,
    "a default system message, if there is none": "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nHelp.<|im_end|>\n{% endif %}" + CHATML,
    "another name for a role": CHATML.replace("m.role", "m.role | upper").replace(
        "assistant", "ASSISTANT"
    ),
    "cuts a thought out of an answer": "m.content.split('</think>')[-1]",
    "another end after an answer": CHATML.replace("\n{% endfor", "{{ eos_token }}\n{% endfor"),
    "begins with a control token": "{{ bos_token }}" + CHATML,
}
FAULTS = {
    "capitalizes": "m.content | capitalize",
    "lower case": "m.content | lower",
    "upper case": "m.content | upper",
    "quotes": "m.content | tojson",
    "escapes": "m.content | e",
    "one line": "m.content.split() | join(' ')",
    "the first line alone": "m.content.split('\n')[0]",
    "counts turns": "loop.index ~ m.content",
    "first turn otherwise": "m.content ~ ('(task)' if loop.index == 2 else '')",
    "last turn otherwise": "m.content ~ ('(think)' if loop.last else '')",
    "repeats the rules": "(messages[0].content if m.role == 'user' else '') ~ m.content",
    "drops earlier turns": CHATML.replace("messages %}", "messages[:1] + messages[-3:] %}"),
    "drops the rules": CHATML.replace("messages %}", "messages[1:] %}"),
    "turns the order round": CHATML.replace("messages %}", "messages | reverse %}"),
    "an end in history alone": CHATML.replace(
        "|>\n{% endfor", "|>{{ eos_token if m.role == 'assistant' and loop.index > 4 }}\n{% endfor"
    ),
    "asks otherwise": CHATML.replace("assistant\n{%", "assistant: {%"),
    "asks for nothing": CHATML.split("{% if add")[0],
    "ends a turn with a blank": CHATML.replace("<|im_end|>", "\n<|im_end|>"),
}


def mutated(change):
    """ChatML with a message's content changed, or the whole of a template."""
    return change if "{%" in change else CHATML.replace("m.content", change)


@mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_a_template_may_do(change):
    for read, rendered in zip(*read_and_rendered(mutated(change), ())):
        assert read == rendered


@mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_what_no_template_may_do(change):
    message = "moves, repeats or drops|frames a second turn otherwise|with no control token"
    with raises(sdar.UserError, match=message):
        read_and_rendered(mutated(change), ())
