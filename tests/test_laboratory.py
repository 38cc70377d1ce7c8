"""The laboratory's survey: one per state of the notebook, and never a stale one."""

from society.agents.laboratory import Laboratory


class Counting:
    """A role that counts how often it is asked."""

    name = "counting"
    asked = 0

    def duties(self, view):
        self.asked += 1
        return []


def test_every_new_view_is_surveyed_even_where_an_old_one_lay_in_memory():
    laboratory = Laboratory.__new__(Laboratory)
    laboratory._surveys = {}
    role = Counting()
    for _ in range(50):
        laboratory._survey(role, object())
    assert role.asked == 50


def test_one_view_is_surveyed_once():
    laboratory = Laboratory.__new__(Laboratory)
    laboratory._surveys = {}
    role, view = Counting(), object()
    for _ in range(3):
        laboratory._survey(role, view)
    assert role.asked == 1
