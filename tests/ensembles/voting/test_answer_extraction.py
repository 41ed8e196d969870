from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.voting.answer_extraction import extract, same_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So it costs $18.", "18"),
        ("18.00", "18"),
        (r"Therefore \boxed{18}", "18"),
        (r"\boxed{1} and then \boxed{\dfrac{1}{2}}", "0.5"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{18\text{ dollars}}", "18"),
        ("the answer is 18 apples, since 3*6 = 18 and 18+1 = 19.", "18"),
        ("The answer is 3 + 4 = 7, as 7 < 9", "7"),
        ("The answer to the question is 12 km.", "12"),
        ("Answer: x = 4\nCheck: 4 + 1 = 5", "4"),
        ("**Final Answer**\n\n**1,234.50**", "1234.5"),
        ("She has 3 * 7 = <<3*7=21>>21 kittens.\nA: 21", "21"),
        ("A: Let's think. There are 3 apples and 4 pears in the bag, so 7 in all.", "7"),
        ("work...\n#### -1,000", "-1000"),
        ("First 10, then 20", "20"),
        ("10-5", "5"),
        ("x = -5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("−3", "-3"),
        ("-.5", "-0.5"),
        ("-0", "0"),
        ("007", "7"),
        ("1e3", "1000"),
        ("2.5E-2", "0.025"),
        ("3/4 of it", "0.75"),
        ("2/6", "1/3"),
        ("1/0", None),
        ("18%", "18"),
        ("25 m²", "25"),
        ("25 m2", "25"),
        ("１８", "18"),
        ("١٨", "18"),
        ("共18个苹果", "18"),
        ("答案是 42。", "42"),
        ("1\u202f000", "1000"),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_numbers(text: str, expected: str | None) -> None:
    assert extract(text, "number") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C", "C"),
        ("(c).", "C"),
        ("**B**", "B"),
        ("The answer is (B).", "B"),
        ("answer is A because it is", "A"),
        ("the answer is a number", None),
        ("Answer: c", "C"),
        ("The answer is Option E", "E"),
        (r"\boxed{\text{D}}", "D"),
        ("C) 25", "C"),
        ("A) 1\nB) 2\nC) 3\nSo B", "B"),
        ("A) 1\nB) 2\nSo A.", "A"),
        ("I think it is D, not (B), so D", "D"),
        ("The correct choice is therefore (E)", "E"),
        ("I am not sure", None),
        ("A cat", None),
        ("", None),
    ],
)
def test_choices(text: str, expected: str | None) -> None:
    assert extract(text, "choice") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("no, because yes", "no"),
        ("**No**", "no"),
        ("The answer is True", "yes"),
        ("Answer: not true", "no"),
        ("that is not correct", "no"),
        ("there are no apples, so yes", "yes"),
        ("FALSE", "no"),
        ("maybe", None),
        ("nothing yesterday", None),
        ("", None),
    ],
)
def test_yes_and_no(text: str, expected: str | None) -> None:
    assert extract(text, "yes_no") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower.", "eiffel tower"),
        ("I thought long.\nAnswer: the  Eiffel tower!", "eiffel tower"),
        (r"\boxed{\text{Ça va}}", "ça va"),
        ("नमस्ते", "नमस्ते"),
        ("你好。", "你好"),
        ("Answer: A", "a"),
        ("vitamin A", "vitamin a"),
        ("U.S.A.", "usa"),
        ("J. K. Rowling", "jk rowling"),
        ("J.K. Rowling", "jk rowling"),
        ("The U.S.", "us"),
        ("Paris<|im_end|>", "paris"),
        ('{"answer": "Paris", "confidence": 0.9}', "paris"),
        ("?!", None),
        ("the", None),
        (" ", None),
    ],
)
def test_short_texts(text: str, expected: str | None) -> None:
    assert extract(text, "text") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"After 7 tries I get \boxed{\frac12}.", "0.5"),
        (r"\boxed{\dfrac 12}", "0.5"),
        ("0.5", "0.5"),
        ("1/2", "0.5"),
        ("½", "0.5"),
        ("50/100", "0.5"),
        ("0,5", "0.5"),
        (".5", "0.5"),
        (r"\boxed{3\frac{1}{2}}", "3.5"),
        (r"\boxed{3 \frac{1}{2}}", "3.5"),
        ("3 1/2", "3.5"),
        ("3½", "3.5"),
        ("3 and 1/2", "3.5"),
        (r"$3\tfrac12$", "3.5"),
        (r"The answer is 3\frac{1}{2}.", "3.5"),
        ("It takes 3 1/2 hours", "3.5"),
        (r"so the largest is $\boxed 2$. I checked 3 cases.", "2"),
        (r"\boxed{\text{18 dollars}}", "18"),
        (r"\boxed{{18}}", "18"),
        (r"\boxed{\mathbf{18}}", "18"),
        (r"\boxed{10^{6}}", "1000000"),
        (r"\boxed{1.5\times10^{3}}", "1500"),
        ("1.5e3", "1500"),
        ("1,500", "1500"),
        ("1.500,00", "1500"),
        ("1 500", "1500"),
        ("1'500", "1500"),
        (r"1\,500", "1500"),
        ("1.5 thousand", "1500"),
        ("1.5k", "1500"),
        ("<answer>18</answer>", "18"),
        ("<answer>$18.00</answer> ok 5", "18"),
        ("<answer>\nJanet makes 18 dollars a day.\n</answer>", "18"),
        (r"<answer>\boxed{18}</answer>", "18"),
        ("<think>99</think><answer>18</answer>", "18"),
        ("<answer>18", "18"),
        ("<think>the answer is 99</think> Janet makes $18", "18"),
        ("<think>so 99", None),
        ("#### 18", "18"),
        ("work\n#### 18\n", "18"),
        ("#### Step 3: compute\n9*2 = 18\n#### Conclusion\nShe makes 18.", "18"),
        ("#### 1,234", "1234"),
        ("####18", "18"),
        ("It is 18 km/h.", "18"),
        ("18 cm^2", "18"),
        ("18 m²", "18"),
        (r"18\text{ cm}^3", "18"),
        ("18°", "18"),
        (r"18^\circ", "18"),
        ("18%", "18"),
        (r"18\%", "18"),
        ("18 percent", "18"),
        ("18 %", "18"),
        ("€18", "18"),
        ("18 €", "18"),
        ("18,00 €", "18"),
        ("1.234,56 €", "1234.56"),
        ("£1,234.56", "1234.56"),
        ("-18", "-18"),
        ("−18", "-18"),
        ("– 18", "18"),
        ("minus 18", "-18"),
        ("negative 18", "-18"),
        (r"\boxed{-\frac{1}{2}}", "-0.5"),
        (r"-\frac12", "-0.5"),
        ("-1/2", "-0.5"),
        (r"\boxed{- 18}", "-18"),
        ("x = -18", "-18"),
        ("x = - 18", "18"),
        (r"The answer is \$18.", "18"),
        ("The answer is $18$.", "18"),
        (r"The answer is \(18\).", "18"),
        (r"The answer is \[ 18 \]", "18"),
        (r"\boxed{2\sqrt{3}}", None),
        (r"so 5 and \boxed{2\pi}", None),
        (r"\boxed{x+1}", None),
        (r"\boxed{3x}", None),
        (r"\boxed{(3,4)}", None),
        (r"\boxed{3 \text{ or } 4}", None),
        (r"\boxed{x=3}", "3"),
        (r"\boxed{3=x}", "3"),
        (r"\boxed{\frac{18}{1}}", "18"),
        (r"\boxed{\text{no solution}} 5", None),
        ("The answer is 3 or 4.", None),
        ("between 3 and 4", "4"),
        ("The answer is between 3 and 4.", None),
        (r"\boxed{3+4=7}", "7"),
        (r"\boxed{7 \text{ (since } 3+4=7)}", "7"),
        ("The answer is not 18 but 20.", "20"),
        ("The answer is not 18. It is 20.", "20"),
        ("I don't think the answer is 18. It is 20.", "20"),
        ("La respuesta es 1.234,50", "1234.5"),
        ("Die Antwort ist 3,5.", "3.5"),
        ("La réponse est 1 234 euros", "1234"),
        ("Ответ: 18", "18"),
        ("答案是18。", "18"),
        ("答えは18です", "18"),
        ("정답은 18입니다", "18"),
        ("共１８个", "18"),
        ("3万", "30000"),
        ("rooms 101 102 103", "103"),
        ("The answer is 18 apples, since 3*6", "18"),
        ("18 (eighteen)", "18"),
        ("She needs 36, 2x as many.", "36"),
        ("1.2.3", None),
        ("the server 192.168.1.1 answers", None),
        ("1.234.567.890", "1234567890"),
        ("On 2024-12-24 he had 7 cats", "7"),
        ("born 24.12.2024", None),
        ("It is 42, not 43.", "42"),
        ("The result is not 42", None),
        ("5 instead of 6", "5"),
        ("3 ± 1", "3"),
        ("x ≠ 5, so 4", "4"),
        ("10:30", None),
        ("It costs $1,000,000.", "1000000"),
        ("1e400", None),
        ("2^10", "1024"),
        ("2^{10}", "1024"),
        (r"\boxed{2^{10}}", "1024"),
        ("2 million", "2000000"),
        ("1,5", "1.5"),
        ("12,5 km", "12.5"),
        ("x^2", None),
        ("log_2 8", "8"),
        ("Answer: 5 + 3 = 8", "8"),
        (r"The final answer is: $\boxed{18}$. I hope it is correct.", "18"),
        (r"\boxed{18} and the answer is 7", "18"),
        ("0.(3)", "1/3"),
        (r"0.\overline{3}", "1/3"),
        ("1/3", "1/3"),
        ("2/6", "1/3"),
        ("0.333", "0.333"),
        (r"\sqrt{16}", "4"),
        (r"\frac{1}{3}", "1/3"),
        (r"\boxed{\frac{2}{6}}", "1/3"),
        ("33\xa0000", "33000"),
        ("The total is 33 000 kr.", "33000"),
        ("$ 18", "18"),
        ("18USD", "18"),
        ("USD 18", "18"),
        ("18.0", "18"),
        ("18.", "18"),
        ("+18", "18"),
        ("(18)", "18"),
        ("**18**", "18"),
        ("`18`", "18"),
        ('"18"', "18"),
        ('{"answer": 18}', "18"),
        ('{"answer": "18"}', "18"),
        ("18 = x", "18"),
        ("Answer: 18\n\nNote: 5 apples remain.", "18"),
        ("The answer is \n\n18", "18"),
        ("\\boxed{\n18\n}", "18"),
        ("The answer is 18,000.", "18000"),
        ("The answer is 18, and 5 remain", "18"),
        (r"\boxed{18,}", "18"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{10,\!000}", "10000"),
        (r"\boxed{18\,\text{km}}", "18"),
        (r"\boxed{18~km}", "18"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{\approx 18}", "18"),
        (r"\boxed{18\text{ m/s}}", "18"),
        (r"\boxed{3:4}", None),
        (r"\boxed{(12)}", "12"),
        (r"\boxed{[12]}", "12"),
        (r"\boxed{(3,4)}", None),
        (r"\boxed{\left(\frac{1}{2}\right)}", "0.5"),
        (r"\boxed{\left(\frac{1}{2}\right)^2}", "0.25"),
        (r"\boxed{{1}/{2}}", "0.5"),
        (r"\boxed{\binom{4}{2}}", "6"),
        (r"\boxed{0.\overline{3}}", "1/3"),
        (r"\boxed{5!}", "120"),
        (r"\boxed{5!!}", "15"),
        (r"\boxed{(5)!}", "120"),
        (r"\boxed{-5!}", "-120"),
        (r"\boxed{x = 5!}", "120"),
        (r"\boxed{5\text{!}}", "120"),
        (r"\boxed{\frac{5!}{3!}}", "20"),
        (r"\boxed{2^{3!}}", "64"),
        (r"\boxed{!5}", None),
        (r"\boxed{2.5!}", None),
        (r"\boxed{100!}", None),
        (r"\boxed{(2+3)!}", None),
        (r"\boxed{n!}", None),
        ("<answer>5!</answer>", "120"),
        ("The answer is $5!$.", "120"),
        ("The answer is 5!, which is the number of orders.", "120"),
        ("The answer is 5! = 120", "120"),
        ("The answer is 5!", "5"),
        ("So she has 18! Great!", "18"),
        (r"\boxed{120}!", "120"),
        (r"\boxed{|-3|}", "3"),
        (r"\boxed{|{-3}|}", "3"),
        (r"\boxed{\left|-\frac{1}{2}\right|}", "0.5"),
        (r"\boxed{\lvert -3 \rvert}", "3"),
        ("The answer is |-3|.", "3"),
        (r"\boxed{\lfloor 3.7 \rfloor}", "3"),
        (r"\boxed{\lceil -3.7 \rceil}", "-3"),
        (r"\boxed{\binom{5}{2}}", "10"),
        (r"\boxed{{5 \choose 2}}", "10"),
        (r"\boxed{_5P_2}", "20"),
        ("The answer is C(5,2).", "10"),
        (r"\boxed{\gcd(4, 6)}", "2"),
        (r"\boxed{\max(4, 6)}", "6"),
        ("The answer is sqrt(16)", "4"),
        ("The answer is the square root of 16.", "4"),
        (r"\boxed{\log 100}", None),
        (r"\boxed{\log_2 8}", None),
        (r"\boxed{\sin(30^\circ)}", None),
        (r"\boxed{f(5)}", None),
        (r"\boxed{f(5) = 12}", "12"),
        (r"\boxed{\Gamma(6)}", None),
        (r"\boxed{\sum_{i=1}^{5} i}", None),
        (r"\boxed{\sum_{i=1}^{5} i = 15}", "15"),
        ("The answer is log(100)", None),
        ("So f(5) is 12", "12"),
        (r"\boxed{\text{five}}", None),
        (r"\boxed{x = 5 \text{ or } x = -5}", None),
        (r"\boxed{x = 1, y = 2}", None),
        (r"\boxed{\pm 5}", None),
        (r"\boxed{x > 3}", None),
        (r"\boxed{12\frac{\text{m}}{\text{s}}}", "12"),
        (r"\boxed{9.8\,\frac{\mathrm{m}}{\mathrm{s}^2}}", "9.8"),
        (r"\boxed{12 \text{ (approximately)}}", "12"),
        ("The answer is 3-4 hours", None),
        ("The answer is 10–12.", None),
        ("The answer is 3 to 4 hours", None),
        ("either 3 or 4", None),
        ("The answer is $2.5M", "2500000"),
        ("$3bn", "3000000000"),
        ("5 M", "5"),
        ("18<|im_end|>", "18"),
        ("<|START_THINKING|>99<|END_THINKING|><|START_RESPONSE|>18<|END_RESPONSE|>", "18"),
        ("18</s> Question 2: 7", "18"),
        ('{"answer": "18", "confidence": 0.9}', "18"),
    ],
)
def test_numbers_are_read_to_their_value_however_they_are_written(text: str, expected: str | None) -> None:
    assert extract(text, "number") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a simple yes or no", None),
        ("A simple yes or no.", None),
        ("Yes or no?", None),
        ("yes/no", None),
        ("Yes.", "yes"),
        ("No doubt, yes.", "yes"),
        ("There is no evidence, so the answer is yes", "yes"),
        ("No, it is not.", "no"),
        ("It isn't true.", "no"),
        ("not incorrect", "yes"),
        ("cannot be true", "no"),
        ("true or false", None),
        ("Answer: yes or no", None),
        ("Answer: I don't know", None),
        ("Oui", "yes"),
        ("Nein.", "no"),
        ("Sí", "yes"),
        ("是", "yes"),
        ("不是", "no"),
        ("Is it yes or no? It is no.", "no"),
        ("No mammals lay eggs, so yes", "yes"),
        ("<think>yes</think>No", "no"),
        (r"\boxed{\text{Yes}}", "yes"),
        ("<answer>no</answer>", "no"),
        ("#### yes", "yes"),
        ("The statement is not true", "no"),
        ("The claim is false.", "no"),
        ("No it is not", "no"),
        ("no", "no"),
        ("NO", "no"),
        ("Answer: No apples were left", None),
        ("Yes and no", None),
        ("The answer is yes.", "yes"),
        ("Answer: **Yes**", "yes"),
        ("Ja, das stimmt", "yes"),
        ("нет", "no"),
        ("The answer is neither yes nor no", None),
        ("Yes? No.", "no"),
        ("Neither is true", "no"),
        ("None of these claims is true.", "no"),
        ("Sim", "yes"),
        ("Não, nunca.", "no"),
        ("Nie.", "no"),
        ("Evet", "yes"),
    ],
)
def test_yes_and_no_are_answers_only_where_they_answer(text: str, expected: str | None) -> None:
    assert extract(text, "yes_no") == expected


@pytest.mark.parametrize("kind", ["number", "choice", "yes_no", "text"])
def test_thoughts_are_no_answers(kind: str) -> None:
    thoughts = {"number": "the answer is 99", "choice": "the answer is C", "yes_no": "yes", "text": "Answer: Rome"}[
        kind
    ]
    answer = {"number": "18", "choice": "A", "yes_no": "no", "text": "paris"}[kind]
    for text in (f"<think>{thoughts}</think>{answer}", f"{thoughts}</think>{answer}", f"{answer}\n[THINK]{thoughts}"):
        assert extract(text, kind) == answer
    assert extract(f"<think>{thoughts}", kind) is None


@pytest.mark.parametrize(
    "spellings",
    [
        ["0.5", "1/2", r"\boxed{\frac12}", r"\boxed{\dfrac 12}", r"$\frac{1}{2}$", "½", "0,5", ".50", "50/100", "5e-1"],
        ["3.5", "3 1/2", r"\boxed{3\frac{1}{2}}", "3½", "7/2", "3,5", "3 and a half", r"\frac72"],
        ["1234.5", "1,234.5", "1.234,5", "1 234,5", "1'234.5", r"1{,}234.5", r"1\,234.50", "$1,234.50", "1.2345e3"],
        ["1000000", "10^6", "10⁶", r"\boxed{10^{6}}", r"1 \times 10^6", "1e6", "1 million", "1,000,000", "10,00,000"],
        ["-3", "−3", r"\boxed{-3}", "-3.0", "minus 3", "-$3", "$-3", r"\frac{-6}{2}", r"-\frac{6}{2}"],
    ],
)
def test_equal_values_agree(spellings: list[str]) -> None:
    assert {extract(spelling, "number") for spelling in spellings} == {extract(spellings[0], "number")}


def test_agreement_is_of_values_not_of_spelling() -> None:
    assert same_answer("18", "It is $18.00", "number")
    assert same_answer("(b)", "The answer is B", "choice")
    assert not same_answer("18", "81", "number")


def test_half_a_character_in_an_answer_of_json_can_be_written() -> None:
    found = extract(r'{"answer": "caf\u00e9 \ud83d"}', "text")
    assert found == "café"


def test_two_abstentions_do_not_agree() -> None:
    assert not same_answer("dunno", "dunno", "number")


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=4, allow_nan=False, allow_infinity=False))
def test_a_number_is_found_again_in_any_spelling(value: Decimal) -> None:
    spellings = [f"{value}", f"{value:,}", f"The answer is ${value:,f}.", rf"\boxed{{{value}}}", f"1 + 1 = {value:f}"]
    found = {extract(spelling, "number") for spelling in spellings}
    assert len(found) == 1
    assert Fraction(found.pop()) == Fraction(value)


@given(st.text(max_size=200), st.sampled_from(["number", "choice", "yes_no", "text"]))
def test_canonical_answers_are_found_in_themselves(text: str, kind: str) -> None:
    answer = extract(text, kind)
    if answer is not None and kind != "text":
        assert extract(answer, kind) == answer


@pytest.mark.parametrize(
    "piece",
    ["answer ", "1,", "{", r"\boxed{", r"\frac{", "$ ", "5!", "|5", "C(", "log ", "⌊", "A:\n", "9", "(", "  \n", "* "],
)
@pytest.mark.parametrize("kind", ["number", "choice", "yes_no", "text"])
def test_long_hostile_texts_take_no_long_time(piece: str, kind: str) -> None:
    started = time.process_time()
    extract(piece * (50_000 // len(piece)), kind)
    assert time.process_time() - started < 2
