from comad.runtime.spelling import hint


def test_the_nearest_name_else_all_of_them():
    known = {"alpha": 1, "beta": 2}
    assert hint("alpah", known) == "did you mean 'alpha'?"
    assert hint("xyz", known) == "there are: alpha, beta."
