"""What messages repeat of what came."""

from fibldm.errors import shown


def test_what_is_long_is_told_by_its_length() -> None:
    """It may be a patient's report; what is short, such as a mistyped option, is told as it is."""
    assert shown("F") == "'F'" and shown(3.5) == "3.5" and shown(["a", 1]) == "['a', 1]"
    report = "Mild fibrosis of both lower lobes, more on the left."
    assert shown(report) == f"a text of {len(report)} characters"
    assert shown([report]) == f"a list of {len(repr([report]))} characters"
    assert shown({"finding": report}).startswith("a dict of ")
    assert shown(report, 80) == repr(report)
