from benchmarks.results_page import PAGE, PARTS, filled
from tests.server.compare.report.sample import sample

PARTED = "before\n<!-- made from demo: {} -->\nold\n<!-- end -->\nafter\n"


def test_each_part_is_made_of_results_and_the_rest_of_the_page_stays() -> None:
    for part in PARTS:
        made = filled(PARTED.format(part), {"demo": sample()})
        assert made.startswith("before\n") and made.endswith("\n<!-- end -->\nafter\n") and "old" not in made
        assert filled(made, {"demo": sample()}) == made, "twice is once"
    assert "| adaptive | 1.164 |" in filled(PARTED.format("arms"), {"demo": sample()})


def test_runs_that_are_not_there_leave_their_parts_and_the_page_names_no_others() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, {}) == page
    filled(page, dict.fromkeys(("demo", "share", "seeds", "merges"), sample()))
