"""A role of your own: undoes the champion's changes one by one. Does each still earn its place?"""

from contextlib import suppress

from society.errors import InvalidVariant
from society.roles import Duty, Lab, Outcome, Role, View


class Simplifier(Role):
    name = "simplifier"
    about = "screens the champion without one of its changes"

    def duties(self, view: View) -> list[Duty]:
        if view.closing or view.champion_screening is None:
            return []
        return [Duty(self.name, "undo", knob, 52, needs_slot=True) for knob in self.simpler(view)]

    async def perform(self, duty: Duty, lab: Lab) -> Outcome:
        run = await lab.screen(self.simpler(lab.view)[duty.subject], idea=f"undo {duty.subject}")
        return Outcome(note=f"without {duty.subject}: {run.outcome} {run.score}")

    def simpler(self, view: View) -> dict:
        found, changes = {}, view.champion.variant.overrides
        seen = {one.variant.fingerprint for one in [*view.screenings, *view.leases]}
        for knob in changes:
            rest = {**changes, knob: view.space.default(knob)}
            with suppress(InvalidVariant):  # the task may refuse the combination
                found[knob] = view.space.variant(view.task.key, rest)
        return {knob: new for knob, new in found.items() if new.fingerprint not in seen}
