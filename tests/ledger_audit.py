"""The rules of the design read off the bare tables: what no program may ever have left there.

Each check is a query of its own that knows nothing of triggers or of the Python that writes, and
returns the rows that break a rule. It runs on every backend.
"""

from __future__ import annotations

from society.memory.ledger import Ledger
from society.memory.schema import FACTS

KIND_LISTS = {
    "screening": "screening",
    "reproduction": "screening",
    "calibration": "verification",
    "verification": "verification",
    "audit": "audit",
    "study": "study",
}

BREACHES = {
    "one living lease per piece of work": """
        SELECT scope, subject FROM leases WHERE state = 'living'
        GROUP BY scope, subject HAVING count(*) > 1""",
    "a finished lease is one run, and a run one finished lease": """
        SELECT l.run_id FROM leases l LEFT JOIN runs r ON r.token = l.token
        WHERE (l.state = 'finished') <> (r.id IS NOT NULL)
        OR (r.id IS NOT NULL AND r.id <> l.run_id)
        """,
    "a run is what its lease says": """
        SELECT r.id FROM runs r JOIN leases l ON l.token = r.token
        WHERE r.agent <> l.holder OR r.kind <> l.kind OR r.variant <> l.variant
        OR r.seed <> l.seed OR r.split <> l.split OR r.scope <> l.scope OR r.society <> l.society
        OR r.attempt <> l.attempt OR r.repeat <> l.repeat
        OR coalesce(r.claim_id, '') <> coalesce(l.claim_id, '')
        OR coalesce(r.data_seed, -1) <> coalesce(l.data_seed, -1)""",
    "later tokens were given later": """
        SELECT l.token FROM leases l JOIN leases n ON n.token = l.token + 1
        WHERE n.created_at < l.created_at""",
    "nobody makes the evidence of a claim of their own": """
        SELECT r.id FROM runs r JOIN claims c ON c.id = r.claim_id WHERE r.agent = c.author""",
    "a run's seed comes from the list of its kind": f"""
        SELECT r.id FROM runs r WHERE NOT EXISTS (SELECT 1 FROM seeds s WHERE s.scope = r.scope
        AND s.seed = r.seed AND s.list = CASE r.kind
        {" ".join(f"WHEN '{kind}' THEN '{which}'" for kind, which in KIND_LISTS.items())} END)""",
    "a seed stands on one list, at one place": """
        SELECT scope, seed FROM seeds GROUP BY scope, seed HAVING count(*) > 1""",
    "seeds are drawn in order": """
        SELECT scope, list FROM seeds GROUP BY scope, list
        HAVING max(position) + 1 <> count(*) OR min(position) <> 0""",
    "a screening or a pool's seed has one result": """
        SELECT scope, variant, seed FROM runs WHERE kind <> 'reproduction' AND kind <> 'study'
        AND (outcome <> 'crashed' OR attempt = 2) GROUP BY scope, variant, seed
        HAVING count(*) > 1""",
    "a claim comes from its author's completed screening run": """
        SELECT c.id FROM claims c LEFT JOIN runs r ON r.id = c.screening_run
        WHERE r.id IS NULL OR r.kind <> 'screening' OR r.outcome <> 'completed'
        OR r.agent <> c.author OR r.variant <> c.variant OR r.scope <> c.scope""",
    "a claim has one closing verdict and one probation": """
        SELECT claim_id FROM verdicts GROUP BY claim_id
        HAVING sum(CASE WHEN decision IN ('accepted', 'rejected', 'superseded') THEN 1 ELSE 0 END)
        <> 1 OR count(*) > 2""",
    "probation follows an acceptance": """
        SELECT v.claim_id FROM verdicts v WHERE v.decision IN ('confirmed', 'rolled_back')
        AND NOT EXISTS (SELECT 1 FROM verdicts a WHERE a.claim_id = v.claim_id
        AND a.decision = 'accepted' AND a.number < v.number)""",
    "an acceptance cites runs": """
        SELECT v.claim_id FROM verdicts v WHERE v.decision = 'accepted'
        AND NOT EXISTS (SELECT 1 FROM verdict_runs e WHERE e.verdict = v.number)""",
    "a verdict cites holdout runs of its claim, never the screening run": """
        SELECT e.run_id FROM verdict_runs e JOIN verdicts v ON v.number = e.verdict
        JOIN claims c ON c.id = v.claim_id LEFT JOIN runs r ON r.id = e.run_id
        WHERE r.id IS NULL OR r.id = c.screening_run OR r.scope <> c.scope
        OR r.variant NOT IN (c.variant, c.reference)
        OR r.kind NOT IN ('calibration', 'verification', 'reproduction')
        OR (r.kind = 'reproduction' AND coalesce(r.claim_id, '') <> c.id)""",
    "the history of champions has no gaps": """
        SELECT scope FROM champions GROUP BY scope
        HAVING min(number) <> 0 OR max(number) + 1 <> count(*)""",
    "a champion rests on an accepted claim about it": """
        SELECT h.number FROM champions h WHERE h.number > 0 AND h.reverts = 0
        AND NOT EXISTS (SELECT 1 FROM claims c JOIN verdicts v ON v.claim_id = c.id
        JOIN verdict_runs e ON e.verdict = v.number JOIN runs r ON r.id = e.run_id
        WHERE c.id = h.claim_id AND c.variant = h.variant AND c.scope = h.scope
        AND v.decision = 'accepted' AND r.variant = c.variant AND r.split = 'holdout')""",
    "a champion has beaten the one before it": """
        SELECT h.number FROM champions h JOIN champions b ON b.scope = h.scope
        AND b.number = h.number - 1 JOIN claims c ON c.id = h.claim_id
        WHERE h.reverts = 0 AND c.reference <> b.variant""",
    "a roll-back restores an earlier champion": """
        SELECT h.number FROM champions h WHERE h.reverts <> 0 AND NOT EXISTS (SELECT 1
        FROM champions b WHERE b.scope = h.scope AND b.number < h.number
        AND b.variant = h.variant)""",
    "a tested hypothesis names a run of its variant, and an untested one was never run": """
        SELECT h.id FROM hypotheses h LEFT JOIN runs r ON r.id = h.run_id
        WHERE (h.state = 'tested' AND (r.id IS NULL OR r.variant <> h.variant
        OR r.scope <> h.scope))
        OR (h.state IN ('open', 'taken') AND EXISTS (SELECT 1 FROM runs s WHERE s.scope = h.scope
        AND s.variant = h.variant AND s.kind = 'screening'))""",
    "a study's result came after its plan, and cites runs": """
        SELECT s.id FROM study_results q JOIN studies s ON s.id = q.study
        WHERE q.concluded_at < s.registered_at UNION ALL
        SELECT e.run_id FROM study_runs e LEFT JOIN runs r ON r.id = e.run_id
        WHERE r.id IS NULL""",
    "the outbox names every screening run, claim, insight, hypothesis and prior": """
        SELECT id FROM runs WHERE kind = 'screening'
        AND id NOT IN (SELECT ref FROM outbox WHERE kind = 'run') UNION ALL
        SELECT id FROM claims WHERE id NOT IN (SELECT ref FROM outbox WHERE kind = 'claim')
        UNION ALL SELECT claim_id FROM verdicts WHERE claim_id NOT IN
        (SELECT ref FROM outbox WHERE kind = 'verdict') UNION ALL
        SELECT id FROM insights WHERE id NOT IN (SELECT ref FROM outbox WHERE kind = 'insight')
        UNION ALL SELECT id FROM hypotheses WHERE id NOT IN
        (SELECT ref FROM outbox WHERE kind = 'hypothesis') UNION ALL
        SELECT id FROM priors WHERE id NOT IN (SELECT ref FROM outbox WHERE kind = 'prior')""",
    "the outbox names nothing else": """
        SELECT ref FROM outbox WHERE NOT (
        (kind = 'run' AND ref IN (SELECT id FROM runs WHERE kind = 'screening'))
        OR (kind = 'claim' AND ref IN (SELECT id FROM claims))
        OR (kind = 'verdict' AND ref IN (SELECT claim_id FROM verdicts))
        OR (kind = 'insight' AND ref IN (SELECT id FROM insights))
        OR (kind = 'hypothesis' AND ref IN (SELECT id FROM hypotheses))
        OR (kind = 'prior' AND ref IN (SELECT id FROM priors)))""",
    "the tallies count the runs": """
        SELECT scope, society, kind, outcome FROM (
        SELECT scope, society, kind, outcome, count(*) AS runs FROM runs
        GROUP BY scope, society, kind, outcome UNION ALL
        SELECT scope, society, kind, outcome, runs FROM tallies) both_counts
        GROUP BY scope, society, kind, outcome
        HAVING count(*) <> 2 OR min(runs) <> max(runs)""",
}
"""Rule -> a query for what breaks it."""


def breaches(ledger: Ledger) -> dict[str, list[tuple[object, ...]]]:
    """What is in the tables against the design: rule -> rows; empty when all is well."""
    with ledger._db.read() as tx:
        found = {
            rule: [tuple(row) for row in tx.exec_driver_sql(query)]
            for rule, query in BREACHES.items()
        }
    return {rule: rows for rule, rows in found.items() if rows}


def fact_counts(ledger: Ledger) -> dict[str, int]:
    """Rows of each table whose rows never go away."""
    parts = (f"SELECT '{table.name}', count(*) FROM {table.name}" for table in (*FACTS,))
    with ledger._db.read() as tx:
        return {name: count for name, count in tx.exec_driver_sql(" UNION ALL ".join(parts))}
