"""A role that publishes far more hypotheses than can be tested, as in the public network."""

import random

from society.records import NewHypothesis, NewInsight
from society.roles import Duty, Outcome, Role

BATCH = 25


class Flooder(Role):
    """Publishes a batch of random ideas after every third run."""

    name = "flooder"

    def duties(self, view):
        """Something to say whenever the notebook has grown."""
        said = len(view.ledger.insights(society=view.society))
        if view.noise is None or view.budget.spent_runs < 3 * said:
            return []
        return [Duty(self.name, "flood", value=90)]

    async def perform(self, duty, lab):
        """Ideas of random worth, and one insight as the mark that it has spoken."""
        view = lab.view
        dice = random.Random(view.budget.spent_runs)
        ideas = [
            NewHypothesis(
                f"idea {n}", "why not", view.space.variant(view.task.key, {"lr": rate}),
                dice.uniform(0, 100),
            )
            for n, rate in enumerate(round(dice.uniform(0.003, 0.05), 6) for _ in range(BATCH))
        ]  # fmt: skip
        return Outcome((NewInsight(f"flood at {view.budget.spent_runs}", ()), *ideas), "flooded")
