"""When an answer counts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.scoring.scorers import load_scorer

LABEL = r"regex:label=(\w+)"


@pytest.mark.parametrize(
    ("spec", "completion", "answers", "right"),
    [
        # Latin
        ("exact", " Music.\n", ["music"], True),
        ("exact", "two  words!", ["Two words"], True),
        ("exact", "music player", ["music"], False),
        ("exact", "", ["music"], False),
        ("exact", "", ["."], False),
        ("exact", " ... ", ["..."], True),
        ("exact", "**refund**", ["refund"], True),
        ("exact", "`refund`", ["refund"], True),
        ("exact", "“Refund.”", ["refund"], True),
        ("exact", "«remboursement»", ["remboursement"], True),
        ("exact", '"yes" or "no"', ['yes" or "no'], False),
        ("exact", "cafe\u0301", ["caf\u00e9"], True),
        ("exact", "cafe", ["café"], False),
        ("exact", "don’t know", ["don't know"], True),
        ("exact", "e\u2011mail", ["e-mail"], True),
        ("exact", "1,000", ["1000"], True),
        ("exact", "1.000", ["1000"], False),
        ("exact", "¿Qué?", ["qué"], True),
        ("exact", "STRASSE", ["Straße"], True),
        ("exact", "10³", ["103"], False),
        ("exact", "İZMİR", ["izmir"], True),
        ("exact", "sí", ["si"], False),
        ("exact", "‘refund’", ["refund"], True),
        *(("exact", f"don{mark}t know", ["don't know"], True) for mark in "‘’‛′´＇ʼ׳"),
        ("exact", "don‚t know", ["don't know"], True),
        ("exact", "dont know", ["don't know"], False),
        ("contains", "It is MUSIC, surely", ["weather", "music"], True),
        ("contains", "musical", ["music"], False),
        ("contains", "the snake_music case", ["music"], False),
        ("contains", "say _music_ now", ["music"], True),
        ("contains", "Ask it again", ["IT"], False),
        ("contains", "Ask IT again", ["IT"], True),
        ("contains", "Ask I.T. again", ["IT"], False),
        ("contains", "the grade is A+", ["A"], False),
        ("contains", "the grade is A+", ["A+"], True),
        ("contains", "so x=[1,2,3]", ["[1,2,3]"], True),
        ("contains", "list[1,2,3]", ["[1,2,3]"], True),
        ("contains", "[1, 2, 3]", ["[1,2,3]"], True),
        ("contains", "[1, 200, 300]", ["[1,200,300]"], True),
        ("contains", "[1, 2, 3, 4]", ["[1,2,3]"], False),
        ("contains", "[1, 23]", ["[1, 2]"], False),
        ("contains", "it is f(x)", ["(x)"], True),
        # numbers inside
        ("contains", "costs 3.50 now", ["3.50"], True),
        ("contains", "costs 3.5 now", ["3.50"], True),
        ("contains", "it is −42", ["42"], False),
        ("contains", "it is −42", ["-42"], True),
        ("contains", "between 10–42 of them", ["42"], True),
        ("contains", "costs 3.5 euros", ["3"], False),
        ("contains", "costs 3.", ["3"], True),
        ("contains", "some 1,000 people", ["1000"], True),
        ("contains", "some 21,000 people", ["1,000"], False),
        ("contains", "by 10 % more", ["10%"], True),
        ("contains", "by 10 % more", ["10"], False),
        ("contains", "at 12:30", ["30"], False),
        ("contains", "at 12:30 sharp", ["12:30"], True),
        ("contains", "agent 7", ["007"], False),
        ("contains", "room 3.5 is", ["room 3"], False),
        ("contains", "is room 3.", ["room 3"], True),
        # Cyrillic
        ("exact", "„Возврат“!", ["возврат"], True),
        ("contains", "Это ВОЗВРАТ, да", ["возврат"], True),
        ("contains", "возвратный", ["возврат"], False),
        ("contains", "п’ять разів", ["п'ять"], True),
        # Greek
        ("exact", "ΛΟΓΟΣ;", ["λόγος"], True),
        ("exact", "παρα", ["παρά"], True),
        ("contains", "ο λόγος είναι", ["λόγος"], True),
        ("contains", "παράλογος", ["λογος"], False),
        # Arabic and Hebrew
        ("exact", "\u200fاسترداد؟", ["استرداد"], True),
        ("contains", "هذا استرداد، نعم", ["استرداد"], True),
        ("contains", "استردادات", ["استرداد"], False),
        ("contains", "العدد ٤٢ صحيح", ["42"], True),
        ("contains", "העדפה: החזר.", ["החזר"], True),
        ("exact", "צה״ל", ['צה"ל'], True),
        ("contains", "החזרים", ["החזר"], False),
        # Devanagari
        ("exact", "वापसी।", ["वापसी"], True),
        ("contains", "यह धन है", ["धन"], True),
        ("contains", "वह धनी है", ["धन"], False),
        ("contains", "निधन", ["धन"], False),
        # Han and Kana
        ("exact", "「退款」。", ["退款"], True),
        ("contains", "这是退款请求", ["退款"], True),
        ("contains", "请联系IT部门", ["IT"], True),
        ("contains", "共42人", ["42"], True),
        ("contains", "これは返金です", ["返金"], True),
        ("contains", "これは交換です", ["返金"], False),
        ("exact", "ﾍﾝｷﾝ！", ["ヘンキン"], True),
        # Hangul
        ("contains", "환불은 가능합니다", ["환불"], True),
        ("contains", "파인애플을 샀다", ["애플"], False),
        ("exact", "환불!", ["\u1112\u116a\u11ab\u1107\u116e\u11af"], True),
        # Thai, Khmer, Myanmar
        ("contains", "ต้องการคืนเงินครับ", ["คืนเงิน"], True),
        ("contains", "ต้องการเปลี่ยนสินค้า", ["คืนเงิน"], False),
        ("contains", "ที่นี่", ["ท"], False),
        ("exact", "សង។", ["សង"], True),
        ("exact", "ပြန်အမ်း။", ["ပြန်အမ်း"], True),
        # number
        ("number", "2 + 40 = 42.", ["42"], True),
        ("number", "42, or 43", ["42"], False),
        ("number", "It is 1,000", ["1000"], True),
        ("number", "Es sind 1.000,00 €", ["1000"], True),
        ("number", "Es sind 1.000", ["1000"], True),
        ("number", "It is 1.000", ["1"], True),
        ("number", "It is 1", ["1.000"], True),
        ("number", "It is 1000", ["1.000"], False),
        ("number", "un total de 12 345,5", ["12345.5"], True),
        ("number", "१,००,००० रुपये", ["100000"], True),
        ("number", "-$5", ["-5"], True),
        ("number", "−5", ["5"], False),
        ("number", "covid-19", ["19"], True),
        ("number", "10 %", ["0.1"], True),
        ("number", "0.1", ["10 %"], True),
        ("number", "10%", ["10"], True),
        ("number", "1000%", ["10%"], False),
        ("number", "1.5 × 10³", ["1500"], True),
        ("number", "2.5e-3", ["0.0025"], True),
        ("number", "1½ cups", ["1.5"], True),
        ("number", r"so \boxed{\frac{3}{4}}", ["0.75"], True),
        ("number", "on 24/12/2024", ["2024"], False),
        ("number", r"\boxed{1{,}000}", ["1000"], True),
        ("number", r"1,\!000", ["1000"], True),
        ("number", r"10\,000 of 10~500", ["10500"], True),
        ("number", r"10\,000", ["10000"], True),
        ("number", r"\frac12", ["0.5"], True),
        ("number", r"-\dfrac 1{2}", ["-0.5"], True),
        ("number", r"1\frac{1}{2}", ["1.5"], True),
        ("number", r"3 \times 10^{5}", ["300000"], True),
        ("number", r"\$5", ["5"], True),
        ("number", "_42_", ["42"], True),
        ("number", "__42__", ["42"], True),
        ("number", "**42**", ["42"], True),
        ("number", "x_42", ["42"], False),
        ("contains", "it is _42_, surely", ["42"], True),
        ("number", "vitamin B12", ["12"], False),
        ("number", "forty-two", ["42"], False),
        ("number", "9^999999999", ["9"], False),
        ("number", "1/0", ["1"], False),
        ("number", "9" * 5000, ["9"], False),
        ("number", "version B1.5", ["5"], False),
        ("number", "٣٫٥", ["3.5"], True),
        ("number", "She has 6 * 7 apples.\n#### 42", ["40 + 2\n#### 42"], True),
        # choice
        ("choice", "B", ["B"], True),
        ("choice", "(b)", ["B"], True),
        ("choice", "**B) refund**", ["B"], True),
        ("choice", "B. A refund is due", ["B"], True),
        ("choice", "Answer: B", ["B"], True),
        ("choice", "The answer is **(B)**.", ["(B)"], True),
        ("choice", "A) is too early, C) too late.\nAnswer: B", ["B"], True),
        ("choice", "A) early\nB) late", ["A"], False),
        ("choice", "A or B", ["B"], False),
        ("choice", "Answer: A or B", ["A"], False),
        ("choice", "Answer: A. No, the answer is B", ["B"], False),
        ("choice", "A refund", ["A"], False),
        ("choice", "A. refund B. cancel C. other", ["A"], False),
        ("choice", "The answer is A because it fits", ["A"], True),
        ("choice", "I think B", ["B"], True),
        ("choice", "C", ["B"], False),
        ("choice", "答案是B。", ["B"], True),
        ("choice", "Ответ: Б", ["Б"], True),
        ("choice", "Refund", ["B"], False),
        ("choice", "Answer: b", ["B"], True),
        ("choice", "Answer: __B__", ["B"], True),
        ("choice", "**Answer:** b\nIt is late.", ["B"], True),
        ("choice", "the answer is option b.", ["B"], True),
        ("choice", "The answer is b because it fits", ["B"], True),
        ("choice", r"\boxed{b}", ["B"], True),
        ("choice", "Ответ: б", ["Б"], True),
        ("choice", "Answer: a refund", ["A"], False),
        ("choice", "Answer: b or c", ["B"], False),
        ("choice", "Answer, e.g. this one: B", ["B"], True),
        ("choice", "b. Paris", ["B"], True),
        ("choice", "(b) Paris", ["B"], True),
        ("choice", "It is (b)", ["B"], True),
        ("choice", "the apple(s)", ["S"], False),
        ("choice", "b\n\nIt is late.", ["B"], True),
        ("choice", "a. early\nb. late", ["A"], False),
        ("choice", "A\nrefund", ["A"], True),
        ("choice", "B, not A", ["B"], True),
        ("choice", "Not A or C, but B", ["B"], True),
        ("choice", "B is right, (A) is wrong", ["B"], True),
        ("choice", "The answer is not A", ["A"], False),
        ("choice", "The answer is not A. It is B", ["B"], True),
        ("choice", "Neither A nor B", ["A"], False),
        ("choice", "答案不是A，是B", ["B"], True),
        ("choice", "option b", ["B"], True),
        ("choice", "Option b is correct", ["B"], True),
        ("choice", "Option a is correct", ["A"], True),
        ("choice", "an option a day", ["A"], False),
        ("choice", "Option A is late, option b is not", ["B"], False),
        ("choice", "A? No. B.", ["B"], True),
        ("choice", "A? No.\nB? Yes.", ["B"], True),
        # json
        ("json", '{"b": [1, 2], "a": 1.0}', ['{"a":1,"b":[1,2.0]}'], True),
        ("json", '```json\n{"a": 1}\n```', ['{"a": 1}'], True),
        ("json", 'Here: {"a": 1}', ['{"a": 1}'], False),
        ("json", "1e99999999999999999999", ['{"a": 1}'], False),
        ("json", '{"a": true}', ['{"a": 1}'], False),
        ("json", '{"a": "X"}', ['{"a": "x"}'], False),
        ("json", '{"a": 2, "a": 1}', ['{"a": 1}'], False),
        ("json", '{"a": NaN}', ['{"a": NaN}'], False),
        ("json", "[2, 1]", ["[1, 2]"], False),
        ("json", '{"a": "\\u9000\\u6b3e"}', ['{"a": "退款"}'], True),
        # regex
        (LABEL, "the label=taxi here", ["taxi"], True),
        (LABEL, "the label=cab here", ["taxi"], False),
        (LABEL, "nothing", ["taxi"], False),
        (r"regex:\d+", "about 42 of them", ["42"], True),
        (r"regex:\d+", "not 41 but 42", ["42"], False),
        (r"regex-last:\d+", "not 41 but 42", ["42"], True),
        (r"regex-last:\d*", "not 41 but 42.", ["42"], True),
        (r"regex:Label: (.*)", "Label: taxi\nas it is late", ["taxi"], True),
        (r"regex:(?s)Label: (.*)", "Label: taxi\nat once", ["taxi at once"], True),
        (r"regex:Label: (.*)", "label: taxi", ["taxi"], False),
        (r"regex:(?i)label: (.*)", "Label: Taxi", ["taxi"], True),
        # reasoning
        ("exact", "<think>a refund?</think>\n\nrefund", ["refund"], True),
        ("exact", "hm, a refund?\n</think>\nrefund", ["refund"], True),
        ("exact", "[THINK]hm[/THINK]refund", ["refund"], True),
        (
            "exact",
            "<|channel|>analysis<|message|>hmassistant<|channel|>final<|message|>refund",
            ["refund"],
            True,
        ),
        ("contains", "<think>a refund?</think>\n\nI do not know", ["refund"], False),
        ("contains", "<think>a refund, a refund, a refund", ["refund"], False),
        ("contains", "<|channel|>analysis<|message|>a refund", ["refund"], False),
        (r"regex:\w+", "<think>hm</think>refund", ["refund"], True),
        ("number", "<think>41</think>none", ["41"], False),
    ],
)
def test_built_in_scorers(spec: str, completion: str, answers: list[str], right: bool) -> None:
    score = load_scorer(spec)(completion, answers)
    assert score == (float(right), {})


@pytest.mark.parametrize(
    ("spec", "answer", "fault"),
    [
        ("exact", "refund", None),
        ("exact", "<think>refund", "does not equal itself"),
        ("number", "$42", None),
        ("number", "many", "ends in no number"),
        *(
            ("number", alone, None)
            for alone in (
                *("#### 42", "40 + 2 = 42\n#### 42", "The answer is 42.", "€3,50", "5 km", "5m²"),
                *(r"5\text{ cm}^2", r"\boxed{\frac12}", r"90^\circ", "1.5 × 10³", "x = 5", "**4**"),
                *("50 percent", "3 1/2", "12 345,5", r"\$1{,}000", r"\(-3\)", "10 m/s^2"),
            )
        ),
        *(
            ("number", more, "more than one number")
            for more in (
                *(r"\sqrt{3}", r"3\pi", r"\frac{\pi}{4}", r"\log_3 2", "6-5i", "x=7, y=2", "2, 3"),
                *("3π", "√3", "5!", "2^x", "5x", "2x²", "±5", "x > 5", "3 million", "2024-01-05"),
            )
        ),
        ("choice", "(B)", None),
        *(("choice", sign, None) for sign in "bБΩ"),
        *(("choice", sign, "not one letter of the Latin") for sign in "ب甲가アकกב"),
        ("choice", "B) refund", "not one letter"),
        ("json", "[1]", None),
        ("json", "{'a': 1}", "no JSON"),
        (r"regex:#### (\d+)", "42", None),
        (r"regex:#### (\d+)", "1,000", None),
        (r"regex:#### (\d+)", "6 * 7 = 42\n#### 42", "finds '42' in it"),
        (r"regex:#### (\d+)", "The answer is 42", "finds nothing in it"),
        (r"regex:(?:is|=) ?(?P<label>[\w()]+)[)]", "taxi", None),
        (r"regex:(?:is|=) ?(?P<label>[\w()]+)[)]", "a taxi", "finds nothing"),
        (r"regex:\w+", "two words", "finds 'two' in it"),
        (r"regex:\w+(?=\.)", "taxi", None),
        (r"regex:(?<=label: )\w+", "taxi", None),
        (r"regex:label: (\w+)(?!\w)", "a taxi", "finds nothing"),
        ("regex:(?x) label= # the (one)\n (\\w+)", "taxi", None),
        ("regex:(?x) label=[#] (\\w+)", "a taxi", "finds nothing"),
        (r"regex:label(?# a (one)=(\w+)", "taxi", None),
    ],
)
def test_answers_that_can_never_be_right(spec: str, answer: str, fault: str | None) -> None:
    fault_of = load_scorer(spec).fault
    assert fault_of is not None
    found = fault_of(answer)
    assert found is None if fault is None else fault in (found or "")


@pytest.fixture
def write_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a module and returns its name; another one in each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code: str, called: str = "scorer") -> str:
        name = f"{called}_of_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        return name

    return write


def test_a_function_of_the_user(write_scorer: Callable) -> None:
    name = write_scorer("def longer(c, a): return len(c) > len(a[0])\n")
    score = load_scorer(f"python:{name}:longer")
    assert score("abc", ["ab"]) == (1.0, {})
    assert score("a", ["ab"]) == (0.0, {})
    assert score("<think>long thoughts</think>a", ["ab"]) == (0.0, {}), "what was thought counts"
    with pytest.raises(InputError, match="has no 'shorter'"):
        load_scorer(f"python:{name}:shorter")


def test_a_thought_without_end_is_wrong_whatever_a_function_says(write_scorer: Callable) -> None:
    name = write_scorer("def polite(c, a): return {'polite': 'idiot' not in c}\n")
    score = load_scorer(f"python:{name}:polite")
    assert score("", ["x"]) == (1.0, {"polite": 1.0})
    assert score("<think>hm", ["x"]) == (0.0, {"polite": 0.0})


def test_rates_have_the_same_names_whatever_the_completion(write_scorer: Callable) -> None:
    """Else each would be a mean over the completions that reached it: 100 %."""
    score = load_scorer(f"python:{write_scorer('def f(c, a): return {c or a[0]: True}')}:f")
    assert score("", ["x"]) == (1.0, {"x": 1.0})
    assert score("", ["y"]) == (1.0, {"y": 1.0}), "another class"
    message = r"got \['x'\] and for 'said' \['said'\], both for \['x'\]; give 0 to a rate"
    with pytest.raises(InputError, match=message):
        score("said", ["x"])
    some = load_scorer(f"python:{write_scorer('def f(c, a): return {c: 1} if c else 1', 'b')}:f")
    assert some("", ["x"]) == (1.0, {})
    with pytest.raises(InputError, match=r"got \[\] and for 'said' \['said'\]"):
        some("said", ["x"])


def test_what_tells_scorers_apart(write_scorer: Callable, tmp_path: Path) -> None:
    """A function's name and the text of its file, wherever that lies."""
    code = "def f(c, a): return True\n"
    (tmp_path / "other").mkdir()
    one, other = tmp_path / "file.py", tmp_path / "other" / "name.py"
    for file in (one, other):
        file.write_text(code)
    specs = (f"{one}:f", f"{other}:f", f"{write_scorer(code)}:f")
    identities = {load_scorer(f"python:{spec}").identity for spec in specs}
    assert len(identities) == 1
    other.write_text(code.replace("True", "False"))
    assert load_scorer(f"python:{other}:f").identity not in identities
    assert load_scorer("python:math:pow").identity == "python:math:pow"
    assert load_scorer("regex:a").identity == "regex:a"


def test_a_module_that_is_broken(write_scorer: Callable) -> None:
    with pytest.raises(InputError, match="SyntaxError"):
        load_scorer(f"python:{write_scorer('def broken(:')}:broken")


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        ("True", (1.0, {})),
        ("0", (0.0, {})),
        ("0.25", (0.25, {})),
        ("1.0000000000000002", (1.0, {})),
        ("numpy.bool_(True)", (1.0, {})),
        ("numpy.float32(0.5)", (0.5, {})),
        ("torch.tensor(0.5)", (0.5, {})),
        ("{'score': 0}", (0.0, {"score": 0.0})),
        ("{'form': True, 'topic': 0.5}", (0.75, {"form": 1.0, "topic": 0.5})),
    ],
)
def test_what_a_function_may_return(write_scorer: Callable, returned: str, score: tuple) -> None:
    name = write_scorer(f"import numpy, torch\ndef f(c, a): return {returned}\n")
    assert load_scorer(f"python:{name}:f")("x", ["y"]) == score


@pytest.mark.parametrize(
    "returned",
    [
        "None",
        "-1.0",
        "2",
        "1.1",
        "float('nan')",
        "'INCORRECT'",
        "(0.0, 'wrong')",
        "[1]",
        "{}",
        "{'score': 'good'}",
        "{'a': {'b': 1}}",
        "{1: 1}",
        "{'': 1}",
        "{' ': 1}",
        "{'two\\nlines': 1}",
        "numpy.array([1.0])",
        "numpy.str_('yes')",
        "torch.tensor([1.0])",
    ],
)
def test_what_a_function_must_not_return(write_scorer: Callable, returned: str) -> None:
    name = write_scorer(f"import numpy, torch\ndef f(c, a): return {returned}\n")
    with pytest.raises(InputError, match="must return a bool, 0 or 1, a number from 0 to 1"):
        load_scorer(f"python:{name}:f")("x", ["y"])


def test_a_scorer_that_exits_is_an_error(write_scorer: Callable) -> None:
    name = write_scorer("import sys\ndef f(c, a): sys.exit(1)\n")
    with pytest.raises(InputError, match="raised SystemExit: 1"):
        load_scorer(f"python:{name}:f")("x", ["y"])
    with pytest.raises(InputError, match="importable module, got SystemExit: 3"):
        load_scorer(f"python:{write_scorer('import sys; sys.exit(3)', 'ends')}:f")


@pytest.mark.filterwarnings("error")
def test_an_async_function_is_refused(write_scorer: Callable) -> None:
    name = write_scorer("async def f(c, a): return True\n")
    with pytest.raises(InputError, match="without async"):
        load_scorer(f"python:{name}:f")("x", ["y"])


def test_a_function_that_asks_for_the_raw_completion(write_scorer: Callable) -> None:
    code = "def f(c, a, raw): return {'calls': '<|call|>' in raw, 'says': c == 'say'}\n"
    score = load_scorer(f"python:{write_scorer(code)}:f")
    assert score("say", ["x"], "say<|call|>") == (1.0, {"calls": 1.0, "says": 1.0})
    assert score("say", ["x"], "say<|im_end|>") == (0.5, {"calls": 0.0, "says": 1.0})
    thought = score("<think>say", ["x"], "<think>say<|call|>")
    assert thought == (0.5, {"calls": 1.0, "says": 0.0})
    assert score("<|call|>", ["x"]) == (0.5, {"calls": 1.0, "says": 0.0})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fuzzy", "exact, contains"),
        ("regex:", "exact, contains"),
        ("regex:(", "valid regular expression"),
        ("regex:(a)(b)", r"at most one group.*got 2"),
        ("python:no_such_module_here:f", "importable module"),
        ("python:one.py:f", "one.py is not there"),
        ("python:folder/one.py:", "must name a file and a function, python:FILE.py:function"),
        ("python:one", "must name a file and a function, python:FILE.py:function"),
        ("python:time:f", r"function of time \(built in\), which has no 'f'"),
    ],
)
def test_scorers_that_do_not_exist(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_scorer(spec)
