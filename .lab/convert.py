"""Questions and skills of others, as envs.py reads them.

    python .lab/convert.py questions train.parquet questions.jsonl
    python .lab/convert.py skills skill_mapping.json skills.json --env alfworld

questions: rows as FlashRAG, Search-R1 or SDAR write them, in JSON lines or a parquet file, become
the lines of envs.SearchEnv. Where they name a split, --eval-split takes that name ("test").
skills: skill_mapping.json of the official repository, beside its Markdown files, becomes the list
of envs.load_skills. In WebShop a task is told by keywords, elsewhere by its type.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import sdar
from envs import ENVS, naming, require

OURS = {  # {task type of the official skills: our name of it}, where it is another
    "pick_and_place": "pick_and_place_simple",
    "direct_retrieval": "direct",
    "multi_hop_reasoning": "multi_hop",
    "entity_attribute_lookup": "attribute",
}


def main(argv=None):
    """Read one file and write the other."""
    parser = sdar.Parser(usage=__doc__)
    parser.add_argument("kind", choices=("questions", "skills"))
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--env", choices=ENVS)
    given = parser.parse_args(argv)
    require(given.out != given.file, f"{given.out} is what is read: name another file")
    rows = questions(given.file) if given.kind == "questions" else skills(given.file, given.env)
    given.out.write_text(rows, "utf-8")


def questions(file):
    """The questions of a file as JSON lines; without those that have no question or no answer."""
    lines = file.read_bytes().splitlines()
    if file.suffix == ".parquet":
        with naming(f"{file} cannot be read by pyarrow (pip install pyarrow)"):
            from pyarrow import parquet

            rows = parquet.read_table(file).to_pylist()
        lines = [json.dumps(row, default=str) for row in rows]

    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with naming(f"{file}, line {number}: not a row of questions"):
            row = question_of(json.loads(line, object_hook=flat), number)
            if row["question"].strip() and row["golden_answers"]:
                found.append(json.dumps(row))
    require(found, f"{file}: no row has a question and an answer")
    print(f"{len(found)} of {len(lines)} lines are rows with a question and an answer")
    return "\n".join(found) + "\n"


def flat(row):
    """The fields of a row that have a value, and of the dicts in it: SDAR has env_kwargs, Search-R1
    reward_model and extra_info, and in parquet what only another row has is None."""
    fields = {}
    for value in row.values():
        if isinstance(value, dict):
            fields |= value
    return fields | {name: value for name, value in row.items() if value is not None}


def question_of(fields, number):
    """A row in our form. number: its line, which is its id where it brings none."""
    golden = fields.get("golden_answers", fields.get("target", []))
    if isinstance(golden, str):  # one answer, or a list that became a text
        golden = json.loads(golden) if golden.startswith("[") else [golden]
    row = {"id": number, "question": "", "data_source": "", "split": ""}
    row |= {name: fields[name] for name in row if name in fields}
    return row | {"golden_answers": [text for text in golden if text.strip()]}


def skills(file, env):
    """The skill bank, as JSON, of skill_files {skill: Markdown}, task_to_skill {task type: skill}
    and task_keywords {task type: texts}. The skill general_skills is for every task."""
    bank = []
    with naming(f"{file} is no skill_mapping.json beside its Markdown files"):
        mapping = json.loads(file.read_bytes())
        for name, markdown in mapping["skill_files"].items():
            text = file.with_name(markdown).read_text("utf-8-sig")
            row = {"name": name, "text": re.sub("^#.*\n", "", text).strip()}
            types = [kind for kind, skill in mapping["task_to_skill"].items() if skill == name]
            if env == "webshop":
                row["keywords"] = sum([mapping["task_keywords"][kind] for kind in types], [])
            else:
                row["task_types"] = [OURS.get(kind, kind) for kind in types]
            if [*row.values()][-1] or name == "general_skills":
                bank.append(row)
    return json.dumps(bank, indent=1)


if __name__ == "__main__":
    sys.exit(sdar.run(main))
