"""Chat templates of many families, those that TRL carries, and ChatML with changes: what the policy
reads is the template's own text, or the model is refused with the reason."""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from conftest import DATA
from pytest import mark, param, raises
from transformers import AutoTokenizer

import sdar
from test_sdar import TEMPLATES, table

CONTROL = re.compile(r"<[|｜]?[^<>{}'\s]+>|\[gMASK\]")  # what a family's tokenizer has as one token
TALK = TEMPLATES["conversation"]
REFUSED = """
"gemma"         "System role not supported"
"idefics3"      "moves, repeats or drops a message"
"smolvlm"       "moves, repeats or drops a message"
"llava_next"    "has no attribute 'text'"
"""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANGES = r"""
"m.content"      "m.content | trim"                            ""
"{% for"         "{{ bos_token }}{% for"                       ""
"{% for"         "<|im_start|>system\nHelp.<|im_end|>\n{% for"  ""
"m.content"      "m.content.split('</think>')[-1]"             ""
"\n{% endfor"    "{{ eos_token }}\n{% endfor"                  ""
"m.content"      "m.content | capitalize"                      "moves, repeats or drops"
"m.content"      "m.content | tojson"                          "moves, repeats or drops"
"m.content"      "m.content | e"                               "moves, repeats or drops"
"m.content"      "m.content.split() | join(' ')"               "moves, repeats or drops"
"m.content"      "m.content.split('\n')[0]"                    "moves, repeats or drops"
"messages %}"    "messages[:1] + messages[-3:] %}"             "moves, repeats or drops"
"messages %}"    "messages | reverse %}"                       "moves, repeats or drops"
"m.content"      "loop.index ~ m.content"                      "frames a second turn otherwise"
"m.content"      "m.content ~ ('!' if loop.index == 2 else '')"  "frames a second turn otherwise"
"m.content"      "m.content ~ ('!' if loop.last else '')"      "frames a second turn otherwise"
"assistant\n{%"  "assistant: {%"                               "frames a second turn otherwise"
"<|im_end|>"     "\n<|im_end|>"                                "no control token"
"""
CASES = [param(CHATML.replace(old, new), why, id=new) for old, new, why in table(CHANGES)]
trl = find_spec("trl").submodule_search_locations[0]  # our own folder, where TRL is not installed
for path in sorted(Path(trl).glob("chat_templates/*.jinja")):
    why = dict(table(REFUSED)).get(path.stem.removesuffix("_training"), "")
    CASES.append(param(path.read_text("utf-8"), why, id=path.stem))


def without(text):
    """A text but for the thought in front of an answer: many templates drop it from turns that are
    over, and the policy has read each."""
    return re.sub(r"<think>\n(\n</think>\n\n)?", "", text)


@mark.parametrize("template, reason", CASES)
def test_a_template_is_read_as_it_is_written_or_refused(template, reason):
    """An example, and two turns."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "qwen3")
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    tokenizer.add_tokens(sorted({*CONTROL.findall(template)}), special_tokens=True)
    tokenizer.chat_template = template
    if reason:
        with raises(Exception, match=reason):  # its own, where the template raises one
            sdar.Chat(tokenizer)
        return
    chat = sdar.Chat(tokenizer)
    texts = [message["content"] for message in TALK]
    ids, _ = chat.first(SimpleNamespace(instructions=texts[0], examples=[texts[1:3]]), texts[3])
    ids += chat.encode(texts[4]) + chat.next(texts[5], last_id=-1)
    read = tokenizer.decode(ids)
    rendered = tokenizer.apply_chat_template(
        TALK,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string="26 Jul 2024",
    )
    # What stands before answers, and in no prompt: a line break of GLM 4.5's, others' channels.
    assert (
        without(read).removeprefix(without(rendered))
        in "\n<|channel|>final<|message|> to=user<|message|>"
    )
    assert rendered[-20:] in read  # the thought that is to come
