"""Data as people have it: thirty files and more, and the line that each of them is told."""

import gzip
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.tasks.contexts import Context
from opcd.tasks.data import read_examples
from opcd.tasks.messages import Message
from opcd.tasks.records import read_records, read_text

CONTEXTS = {"": Context([{"role": "system", "content": "Answer with\none word."}])}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(folder: Path, name: str, content: str | bytes) -> str:
    data = content.encode("utf-8") if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return str(folder / name)


SKY = [user("Sky?")]
OPENAI = [system("Answer with one  word."), user("Sky?"), assistant("Blue")]
SHAREGPT = [
    {"from": "system", "value": "Answer with one word."},
    {"from": "human", "value": "Grass?"},
    {"from": "gpt", "value": "Green"},
    {"from": "human", "value": "Sky?"},
    {"from": "gpt", "value": "Blue"},
]
BATCH = {
    "custom_id": "1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "m", "temperature": 0, "system": "Answer with one word.", "messages": SKY},
}
PARTS = [{"type": "text", "text": "Look up."}, {"type": "text", "text": "Sky?"}]
PLAIN = lines({"prompt": "Sky?", "answer": "Blue"})

# Evaluation data: file, content, the messages and answers of its last row, the remarks on it.
GOOD = {
    "plain": ("d.jsonl", PLAIN, SKY, ["Blue"], []),
    "messages": ("d.jsonl", lines({"messages": SKY, "answer": ["Blue", "b"]}), SKY, "Blue b", []),
    "array": ("d.json", '[\n{"prompt": "Sky?", "answer": "Blue"}\n]', SKY, ["Blue"], []),
    "JSONL in a .json": ("d.json", PLAIN + PLAIN, SKY, ["Blue"], []),
    "one pretty object": ("d.json", '{\n"prompt": "Sky?",\n"answer": "Blue"\n}', SKY, ["Blue"], []),
    "data": ("d.json", '{"data": [\n{"prompt": "Sky?", "answer": "Blue"}]}', SKY, ["Blue"], []),
    "gzip": ("d.jsonl.gz", gzip.compress(PLAIN.encode()), SKY, ["Blue"], []),
    "Windows": ("d.jsonl", "\ufeff" + PLAIN.replace("\n", "\r\n"), SKY, ["Blue"], []),
    "OpenAI": (
        "d.jsonl",
        lines({"messages": OPENAI}, {"messages": OPENAI}),
        SKY,
        ["Blue"],
        [
            "d.jsonl: 2 OpenAI rows; the system message is the context and was taken out; the last "
            "assistant message is the answer"
        ],
    ),
    "developer": (
        "d.jsonl",
        lines(
            {
                "messages": [{"role": "developer", "content": "Today is Monday."}, *SKY],
                "answer": "Blue",
            }
        ),
        [system("Today is Monday."), *SKY],
        ["Blue"],
        ["d.jsonl: 1 OpenAI row; a system message of its own stays with the request"],
    ),
    "batch": (
        "d.jsonl",
        lines(BATCH | {"answer": "Blue"}),
        SKY,
        ["Blue"],
        [
            "d.jsonl: 1 OpenAI batch row; the system message is the context and was taken out; "
            "columns left out: body.model, body.temperature"
        ],
    ),
    "TRL": (
        "d.jsonl",
        lines({"prompt": OPENAI[:2], "completion": OPENAI[2:]}),
        SKY,
        ["Blue"],
        [
            'd.jsonl: 1 TRL row; the system message is the context and was taken out; "completion" '
            "is the answer"
        ],
    ),
    "ShareGPT": (
        "d.json",
        json.dumps([{"id": "a7", "conversations": SHAREGPT}]),
        [user("Grass?"), assistant("Green"), *SKY],
        ["Blue"],
        [
            "d.json: 1 ShareGPT row; the system message is the context and was taken out; the last "
            "assistant message is the answer; columns left out: id"
        ],
    ),
    "Alpaca": (
        "d.json",
        json.dumps(
            [
                {"instruction": "Name its colour.", "input": "Sky?", "output": "Blue"},
                {"instruction": "Sky?", "input": "", "output": "Blue"},
            ]
        ),
        SKY,
        ["Blue"],
        [
            "d.json: 2 Alpaca rows; instruction and input joined by a blank line (1 of 2); "
            '"output" is the answer'
        ],
    ),
    "question": (
        "d.jsonl",
        lines({"question": "Sky?", "answer": "Blue", "difficulty": 3}),
        SKY,
        ["Blue"],
        ['d.jsonl: 1 plain row; "question" is the prompt; columns left out: difficulty'],
    ),
    "a system column": (
        "d.jsonl",
        lines({"system": "Answer with one word.", "prompt": "Sky?", "label": "Blue"}),
        SKY,
        ["Blue"],
        [
            "d.jsonl: 1 plain row; the system message is the context and was taken out; "
            '"label" is the answer'
        ],
    ),
    "numbers": (
        "d.jsonl",
        lines({"prompt": "Sky?", "answers": [12, 0.5, 3.0, True]}),
        SKY,
        ["12", "0.5", "3", "true"],
        [
            'd.jsonl: 1 plain row; "answers" is the answer; numbers, true and false are answers as '
            "text"
        ],
    ),
    "numbers as they are spelled": (
        "d.jsonl",
        '{"prompt": "Sky?", "answer": [4.50, 1e-7, 0.1234567890123456789, 10.0]}',
        SKY,
        ["4.50", "1e-7", "0.1234567890123456789", "10"],
        ["d.jsonl: 1 plain row; numbers, true and false are answers as text"],
    ),
    "a choice among no tools": (
        "d.jsonl",
        lines({"messages": SKY, "answer": "Blue", "tool_choice": "none", "context": ""}),
        SKY,
        ["Blue"],
        ["d.jsonl: 1 plain row; columns left out: tool_choice"],
    ),
    "text parts": (
        "d.jsonl",
        lines({"messages": [{"role": "user", "content": PARTS, "name": None}], "answer": "Blue"}),
        [user("Look up.\nSky?")],
        ["Blue"],
        ["d.jsonl: 1 plain row; text parts joined by line breaks"],
    ),
    "keys of messages that say nothing": (
        "d.jsonl",
        lines(
            {
                "messages": [
                    user("Grass?"),
                    assistant("Green") | {"weight": 1, "tool_calls": [], "refusal": None},
                    *SKY,
                ],
                "answer": "Blue",
            }
        ),
        [user("Grass?"), assistant("Green"), *SKY],
        ["Blue"],
        [],
    ),
    "a user who says what the context says": (
        "d.jsonl",
        lines({"messages": [user("Answer with one word."), *OPENAI[1:], *SKY], "answer": "Blue"}),
        [user("Answer with one word."), *OPENAI[1:], *SKY],
        ["Blue"],
        [
            "d.jsonl: 1 plain row; the context's text stands in the request as well, where the "
            "student sees it"
        ],
    ),
    "the context in the prompt": (
        "d.jsonl",
        lines({"prompt": "Answer with one word. Sky?", "answer": "Blue", "history": []}),
        [user("Answer with one word. Sky?")],
        ["Blue"],
        [
            "d.jsonl: 1 plain row; the context's text stands in the request as well, where the "
            "student sees it; columns left out: history"
        ],
    ),
    "reasoning": (
        "d.jsonl",
        lines({"messages": [*SKY, assistant("<think>Hm.</think>\n\nBlue")]}),
        SKY,
        ["Blue"],
        ["d.jsonl: 1 OpenAI row; the last assistant message is the answer"],
    ),
    "an answer beside the last message": (
        "d.jsonl",
        lines({"messages": [*SKY, assistant("It is blue.")], "answer": "Blue", "tools": []}),
        SKY,
        ["Blue"],
        ["d.jsonl: 1 OpenAI row; the last assistant message left out; columns left out: tools"],
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_files_that_are_read(tmp_path: Path, case: str) -> None:
    name, content, messages, answers, remarks = GOOD[case]
    examples, said = read_examples(written(tmp_path, name, content), True, CONTEXTS)
    assert list(examples[-1].messages) == messages
    assert list(examples[-1].answers) == (answers.split() if isinstance(answers, str) else answers)
    assert said == remarks


# Evaluation data that is refused: file, content, the whole message.
BAD = {
    "CSV": (
        "d.csv",
        "prompt,answer\nSky?,Blue\n",
        "evaluation data must be JSONL or a JSON array, got 'd.csv' (.csv); convert it: python -c "
        "\"import csv, json; open('d.jsonl', 'w', encoding='utf-8').writelines(json.dumps(row) + "
        "chr(10) for row in csv.DictReader(open('d.csv', encoding='utf-8-sig', newline='')))\"",
    ),
    "Excel": (
        "d.xlsx",
        b"PK\x03\x04",
        "evaluation data must be JSONL or a JSON array, got 'd.xlsx' (.xlsx); convert it: python "
        "-c \"import pandas; pandas.read_excel('d.xlsx').to_json('d.jsonl', orient='records', "
        'lines=True, force_ascii=False)"',
    ),
    "parquet without its name": (
        "d.jsonl",
        b"PAR1\x15\x04",
        "evaluation data must be JSONL or a JSON array, got 'd.jsonl' (.parquet); convert it: "
        "python -c \"import pandas; pandas.read_parquet('d.jsonl').to_json('d.parquet.jsonl', "
        "orient='records', lines=True, force_ascii=False)\"",
    ),
    "a packed table": (
        "d.csv.gz",
        gzip.compress(b"prompt,answer\n"),
        "evaluation data must be JSONL or a JSON array, got 'd.csv.gz' (.csv); unpack it first (a "
        ".jsonl.gz is read as it is)",
    ),
    "a pickle": (
        "d.pkl",
        b"\x80\x04",
        "evaluation data must be JSONL or a JSON array, got 'd.pkl' (.pkl); save it as JSONL: one "
        '{"prompt": "..."} a line',
    ),
    "lines of text": (
        "d.txt",
        "Sky?\nGrass?\n",
        'd.txt:1: must be JSONL: one {"prompt": "..."} a line (or a JSON array of them), got the '
        "text 'Sky?'; convert it",
    ),
    "UTF-16": (
        "d.jsonl",
        PLAIN.encode("utf-16"),
        "d.jsonl: must be UTF-8 text, got UTF-16; save the file as UTF-8",
    ),
    "half a gzip file": (
        "d.jsonl.gz",
        gzip.compress(PLAIN.encode())[:-9],
        "d.jsonl.gz: evaluation data must be a whole gzip file, got Compressed file ended before "
        "the end-of-stream marker was reached; copy it again",
    ),
    "a comma that is missing": (
        "d.json",
        '[\n  {"prompt": "a"}\n  {"prompt": "b"}\n]',
        "d.json:3 (row 1): a file that opens with [ must be one JSON array, got no comma and no ] "
        "behind a value at column 3; correct that line",
    ),
    "a broken row": (
        "d.json",
        '{"data": [\n  {"prompt": "Sky?", "answer": "Blue"},\n  {"prompt": NaN}\n]}',
        "d.json:3 (row 2): a file that opens with [ must be one JSON array, got NaN, which JSON "
        "does not have; correct that line",
    ),
    "a Windows path": (
        "d.jsonl",
        '{"prompt": "C:\\Users", "answer": "x"}',
        "d.jsonl:1: each line must be one JSON object, got Invalid \\escape at column 15; write a "
        'backslash as "\\\\", in a path also as "/"',
    ),
    "more than a list": (
        "d.json",
        '{"data": [{"prompt": "a"}], "version": 1}',
        "d.json:1: a file must hold nothing but its rows, got an object with lists of rows as "
        "data; write the list that is meant into a file of its own",
    ),
    "a file of two parts": (
        "d.json",
        '{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}',
        "d.json:1: a file must hold nothing but its rows, got an object with lists of rows as "
        "train and test; write the list that is meant into a file of its own",
    ),
    "turns under a name of their own": (
        "d.jsonl",
        lines({"id": 1, "contents": [{"role": "user", "parts": [{"text": "Sky?"}]}]}),
        'd.jsonl:1: must have "prompt" (the user\'s message) or "messages", got keys '
        "['contents', 'id']; add \"prompt\"",
    ),
    "one conversation": (
        "d.json",
        json.dumps([user("Sky?"), assistant("Blue")]),
        "d.json:1 (row 1): a row must be a whole conversation, got one message of it; write "
        '{"messages": [...]} around its messages',
    ),
    "results of a batch": (
        "d.jsonl",
        lines({"custom_id": "1", "response": {"body": {"choices": []}}, "error": None}),
        "d.jsonl:1: a row must hold its request, got a result of a batch; put what it answers into "
        '{"messages": [...]} of the batch\'s row with the same custom_id',
    ),
    "columns in capitals": (
        "d.jsonl",
        lines({"Prompt": "Sky?", "Answer": "Blue"}),
        'd.jsonl:1: must have "prompt" (the user\'s message) or "messages", got keys [\'Answer\', '
        '\'Prompt\']; rename "Prompt" to "prompt"',
    ),
    "a column with a space": (
        "d.jsonl",
        lines({"prompt": "Sky?", "answer ": "Blue"}),
        'd.jsonl:1: evaluation data needs "answer" (a string or a list of accepted ones) in '
        "every row, or in none, got keys ['answer ', 'prompt']; rename \"answer \" to \"answer\"",
    ),
    "CSV by another name": (
        "d.jsonl",
        '"prompt";"answer"\n"Sky, or sea?";"Blue"\n',
        "evaluation data must be JSONL or a JSON array, got 'd.jsonl' (.csv); convert it: python "
        "-c \"import csv, json; open('d.csv.jsonl', 'w', encoding='utf-8').writelines(json.dumps("
        "row) + chr(10) for row in csv.DictReader(open('d.jsonl', encoding='utf-8-sig', "
        "newline=''), delimiter=';'))\"",
    ),
    "more than a number can be": (
        "d.jsonl",
        '{"prompt": "Sky?", "answer": 1e400}',
        "d.jsonl:1: each line must be one JSON object, got 1e400, which is too large for a number; "
        "correct that line",
    ),
    "a tool's result without a call": (
        "d.jsonl",
        lines({"messages": [*SKY, {"role": "tool", "content": "blue"}], "answer": "Blue"}),
        "d.jsonl:1: message 1 must answer a call of the assistant's turn in front of it, got the "
        "result of a tool that no call is left for; remove it, or add the call",
    ),
    "tool calls": (
        "d.jsonl",
        lines({"messages": [*SKY, assistant("x") | {"content": None, "tool_calls": [{"id": 1}]}]}),
        'd.jsonl:1: message 1: call 0 must be {"name": ..., "arguments": {...}}, got '
        "{'id': 1}; correct it ({} where it takes none)",
    ),
    "tools beside the messages": (
        "d.jsonl",
        lines(BATCH | {"body": {"messages": SKY, "tools": [{"type": "function"}]}}),
        'd.jsonl:1: "tools": tool 0: "name" must be that of a function, text without spaces around '
        "it, got None; correct it",
    ),
    "tools in a column": (
        "d.jsonl",
        lines({"messages": SKY, "answer": "Blue", "tools": [{"name": "look"}]}),
        "d.jsonl:1: the tools of a row must be its context's, got look where the context has none; "
        'put them into the context ({"messages": [...], "tools": [...]}), of which each set of '
        "tools needs one with a name of its own, or leave them out of the row",
    ),
    "an image in a column": (
        "d.jsonl",
        lines({"prompt": "Sky?", "answer": "Blue", "image": "sky.png"}),
        'd.jsonl:1: a row must be text, got "image", and images and sounds are not supported; '
        "leave that row out",
    ),
    "images": (
        "d.jsonl",
        lines({"messages": [user("") | {"content": [*PARTS, {"type": "image_url"}]}]}),
        "d.jsonl:1: the content of message 0 must be text, got a part of type 'image_url'; images, "
        "sounds and files are not supported; leave that row out",
    ),
    "a name": (
        "d.jsonl",
        lines({"messages": [user("Sky?") | {"name": "Ann"}], "answer": "Blue"}),
        "d.jsonl:1: message 0 must have a role and a content alone, got \"name\": 'Ann', which the "
        "model would not see; remove it, or write it into the content",
    ),
    "an empty answer": (
        "d.jsonl",
        lines({"prompt": "Sky?", "answer": ""}),
        "d.jsonl:1: an \"answer\" must not be blank, got ''; remove it, or write a word for it, "
        'like "none", that the context asks for',
    ),
    "a class number": (
        "d.jsonl",
        lines({"prompt": "Sky?", "label": 2}),
        'd.jsonl:1: "label" must be text, got 2; write what the model should answer, the class by '
        'its name, or rename it to "answer" if it is that number',
    ),
    "a table by columns": (
        "d.json",
        json.dumps({"prompt": {"0": "Sky?" * 30}, "answer": {"0": "Blue"}}),
        "d.json:1: \"prompt\" must be one request, text or messages, got {'0': 'Sky?Sky?Sky?Sky?"
        'Sky?Sky?Sky?Sky?Sky?Sky?Sky?Sky?Sky?S; write a table row by row: {"prompt": "...", '
        '"answer": "..."}',
    ),
    "a table by lists": (
        "d.json",
        '{"prompt": ["Sky?", "Sea?"], "answer": ["Blue", "Green"]}',
        "d.json:1: \"prompt\" must be one request, text or messages, got ['Sky?', 'Sea?']; "
        'write a table row by row: {"prompt": "...", "answer": "..."}',
    ),
    "two columns of answers": (
        "d.jsonl",
        lines({"prompt": "Sky?", "answer": "Blue", "answers": ["Azure"]}),
        "d.jsonl:1: the accepted answers must stand in one column, got answer and answers; put "
        'them into "answer", as a list',
    ),
    "two completions": (
        "d.jsonl",
        lines({"messages": [*SKY, assistant("Blue")], "response": "Azure"}),
        "d.jsonl:1: a row must have one completion, got response and the last assistant message; "
        "remove the one that is not meant",
    ),
    "another name": (
        "d.jsonl",
        lines({"prompt": "Sky?", "target": "Blue"}),
        'd.jsonl:1: got a column "target", which has no meaning here; rename it to "answer" if it '
        "is that, else remove it",
    ),
    "two system messages": (
        "d.jsonl",
        lines({"messages": OPENAI, "system": "Today is Monday."}),
        "d.jsonl:1: a row must have one system message, got 2; merge them into one",
    ),
    "the context and more": (
        "d.jsonl",
        lines({"prompt": "Sky?", "system": "Answer with one word. Today is Monday."}),
        "d.jsonl:1: a row's system message must not hold the context, which the student must not "
        "see, got all of it and more; keep only what is this request's own",
    ),
    "two answers in a row": (
        "d.jsonl",
        lines({"messages": [*SKY, assistant("Blue"), assistant("Green")]}),
        "d.jsonl:1: the last message must be the user's or a tool's, or the one answer behind it, "
        "got roles user, assistant; the model writes the answer",
    ),
    "nothing behind the reasoning": (
        "d.jsonl",
        lines({"messages": [*SKY, assistant("<think>Blue</think>")]}),
        "d.jsonl:1: an answer must stand behind its reasoning, got nothing behind it; add "
        "it, or remove the row",
    ),
    "no answer": (
        "d.jsonl",
        lines({"prompt": "Sky?", "completion": ""}),
        'd.jsonl:1: evaluation data needs "answer" (a string or a list of accepted ones) in '
        "every row, or in none, got keys ['completion', 'prompt']; add \"answer\"",
    ),
    "a class by another name": (
        "d.jsonl",
        lines({"prompt": "Sky?", "intent": "weather"}),
        'd.jsonl:1: evaluation data needs "answer" (a string or a list of accepted ones) in '
        "every row, or in none, got keys ['intent', 'prompt']; rename \"intent\" to \"answer\" if "
        "it is that",
    ),
    "a request by another name": (
        "d.jsonl",
        lines({"text": "Sky?", "category": "weather"}),
        'd.jsonl:1: must have "prompt" (the user\'s message) or "messages", got keys '
        "['category', 'text']; rename \"text\" to \"prompt\" if it is that",
    ),
    "two requests": (
        "d.jsonl",
        lines({"prompt": "Sky?", "question": "Sea?", "answer": "Blue"}),
        "d.jsonl:1: the request must stand in one column, got prompt and question; remove those "
        "that are not the user's message",
    ),
    "a preference": (
        "d.jsonl",
        lines({"prompt": "Sky?", "rejected": "Green", "answer": "Blue"}),
        'd.jsonl:1: got a column "rejected", which has no meaning here; remove it',
    ),
    "a part of an odd type": (
        "d.jsonl",
        lines({"messages": [user("") | {"content": [{"type": ["text"], "text": "Sky?"}]}]}),
        "d.jsonl:1: the content of message 0 must be text, got a part of type \"['text']\"; "
        "images, sounds and files are not supported; leave that row out",
    ),
    "an empty system message": (
        "d.jsonl",
        lines({"messages": [system(""), *SKY], "answer": "Blue"}),
        "d.jsonl:1: the content of message 0 must be a non-empty string, got ''; leave that "
        "message out, or write what it says",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, content, message = BAD[case]
    written(tmp_path, name, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        read_examples(name, True, CONTEXTS)
    assert str(refused.value) == message


def test_training_rows_are_read_without_their_answers(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", lines({"messages": OPENAI}, {"messages": SKY, "answer": 1}))
    examples, said = read_examples(path, False, CONTEXTS)
    assert [(list(e.messages), e.answers) for e in examples] == [(SKY, ()), (SKY, ())]
    assert said == [
        "p.jsonl: 1 OpenAI row, 1 plain row; the system message is the context and was taken out "
        "(1 of 2); the last assistant message left out (1 of 2); answers left out: training needs "
        "none (1 of 2)"
    ]


def test_training_rows_are_not_judged_by_what_training_needs_not(tmp_path: Path) -> None:
    rows = (
        {"prompt": "Sky?", "label": 2},
        {"prompt": "Sky?", "answer": "Blue", "answers": ["Azure"]},
        {"prompt": "Sky?", "answer": " "},
        {"prompt": "Sky?", "reference": "Blue", "rejected": "Green"},
        {"messages": [*SKY, assistant("Blue")], "response": "Azure"},
    )
    for row in rows:
        with pytest.raises(InputError):
            read_examples(written(tmp_path, "p.jsonl", lines(row)), True, CONTEXTS)
    examples, said = read_examples(written(tmp_path, "p.jsonl", lines(*rows)), False, CONTEXTS)
    assert [list(e.messages) for e in examples] == [SKY] * 5
    assert said == [
        "p.jsonl: 4 plain rows, 1 OpenAI row; answers left out: training needs none (3 of 5); "
        '"response" and the last assistant message left out (1 of 5); columns left out: reference, '
        "rejected"
    ]


@pytest.mark.parametrize(
    "last",
    [
        assistant(""),
        assistant("Blue") | {"content": None, "tool_calls": [{"id": 1}]},
        assistant("Blue") | {"reasoning_content": "Hm."},
        assistant("") | {"refusal": "No."},
        {"role": "assistant"},
        {"from": "gpt", "value": ""},
    ],
)
def test_the_last_answer_of_a_training_row_is_not_judged(tmp_path: Path, last: dict) -> None:
    rows = lines({"messages": [*SKY, last]}, BATCH | {"body": {"messages": [*OPENAI[:2], last]}})
    examples, said = read_examples(written(tmp_path, "p.jsonl", rows), False, CONTEXTS)
    assert [list(e.messages) for e in examples] == [SKY, SKY]
    assert "the last assistant message left out" in said[0]
    with pytest.raises(InputError, match="message 1"):
        read_examples(written(tmp_path, "p.jsonl", rows), True, CONTEXTS)


def test_the_demonstrations_of_a_context_are_taken_out_or_refused(tmp_path: Path) -> None:
    shown = [user("Grass?"), assistant("Green"), user("Snow?"), assistant("White")]
    own = system("Today is Monday.")

    def read(*front: Message, context: list[Message]) -> tuple[list[Message], list[str]]:
        path = written(tmp_path, "p.jsonl", lines({"messages": [*front, *SKY]}))
        (example,), said = read_examples(path, False, {"": Context(context)})
        return list(example.messages), said

    form, taken = "p.jsonl: 1 plain row; ", "the context's demonstrations were taken out"
    with_system = [system("One word."), *shown]
    assert read(*shown, context=with_system) == (SKY, [form + taken])
    assert read(*shown, context=shown) == (SKY, [form + "the whole context was taken out"])
    for context in (shown, with_system):
        assert read(own, *shown, context=context) == (
            [own, *SKY],
            ["p.jsonl: 1 OpenAI row; a system message of its own stays with the request; " + taken],
        )
    for front in (shown[:2], shown[2:], [*shown, *shown[:2]], [*with_system[:1], *shown[:2]]):
        with pytest.raises(InputError, match=r"p\.jsonl:1: a request must begin with all demonstr"):
            read(*front, context=with_system)
    other = [user("Grass?"), assistant("Brown")]
    assert read(*other, context=with_system) == ([*other, *SKY], [])
    greeting = assistant("Hello.")
    assert read(greeting, context=[system("One word."), greeting]) == (SKY, [form + taken])


def test_a_row_that_begins_with_the_whole_context(tmp_path: Path) -> None:
    """Requests as they are sent to a server carry the demonstrations as well."""
    context = [system("One word."), user("Grass?"), assistant("Green")]
    contexts = {"a": Context(context), "b": Context([system("A sentence.")])}
    path = written(
        tmp_path,
        "p.jsonl",
        lines(
            {"messages": [*context, *SKY], "context": "a"},
            {"messages": [context[0], *SKY], "context": "a"},
            {"messages": [context[0], *SKY], "context": "b"},
        ),
    )
    examples, said = read_examples(path, False, contexts)
    assert [list(e.messages) for e in examples] == [SKY, SKY, [system("One word."), *SKY]]
    assert said == [
        "p.jsonl: 3 OpenAI rows; the whole context was taken out (1 of 3); the system message is "
        "the context's and was taken out (1 of 3); a system message of its own stays with the "
        "request (1 of 3)"
    ]


def test_places_of_an_array(tmp_path: Path) -> None:
    """Lines as an editor counts them, rows where several share a line."""
    path = written(tmp_path, "d.json", '\n[ {"a": 1}, {"a": 2},\n\n{"a":\n3}]\n')
    assert read_records(path, "prompts") == [
        (f"{path}:2 (row 1)", {"a": 1}),
        (f"{path}:2 (row 2)", {"a": 2}),
        (f"{path}:4 (row 3)", {"a": 3}),
    ]


def test_a_row_whose_first_column_is_a_list_is_no_wrapper(tmp_path: Path) -> None:
    rows = [{"tools": [{"a": 1}], "prompt": "x"}, {"messages": [{"b": 2}]}, {"data": [{"c": 3}]}]
    for first, second in ((0, 1), (1, 0), (2, 1)):
        path = written(tmp_path, "d.jsonl", lines(rows[first], rows[second]))
        found = [record for _, record in read_records(path, "prompts")]
        assert found == [rows[first], rows[second]]
    for row in rows[:2]:
        path = written(tmp_path, "d.jsonl", lines(row))
        assert read_records(path, "prompts") == [(f"{path}:1", row)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", '\ufeffprompt,answer\r\n"Sky, or\nsea?",Blau\u00e9\r\n'),
        ("d.tsv", 'prompt\tanswer\n"Sky, or\nsea?"\tBlau\u00e9\n'),
        ("d.yaml", '- {prompt: "Sky, or\\nsea?", answer: Blau\u00e9}\n'),
        ("it's $HOME.csv", 'prompt;answer\n"Sky, or\nsea?";Blau\u00e9\n'),
        ('d`"!.tsv', 'prompt\tanswer\n"Sky, or\nsea?"\tBlau\u00e9\n'),
    ],
)
def test_the_command_that_an_error_gives_converts_the_file(
    tmp_path: Path, name: str, content: str
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(InputError) as refused:
        read_records(path, "prompts")
    command = str(refused.value).partition("convert it: python ")[2]
    subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, check=True)
    record = {"prompt": "Sky, or\nsea?", "answer": "Blau\u00e9"}
    path = str((tmp_path / name).with_suffix(".jsonl"))
    assert read_records(path, "prompts") == [(f"{path}:1", record)]


def test_a_path_with_an_escape_that_yaml_took() -> None:
    with pytest.raises(InputError, match="it holds a tab or a line break"):
        read_text("C:\temp\new.md", "context")
