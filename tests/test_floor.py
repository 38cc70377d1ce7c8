"""The floor: one at a time, in a fixed order, and quiet when nobody has anything to do."""

import asyncio

from society.agents.floor import Floor


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 5))


def test_only_one_holds_the_floor():
    async def scene():
        floor, inside, most = Floor(5), 0, 0

        async def member():
            nonlocal inside, most
            await floor.enter(lambda: True)
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1
            floor.leave()

        await asyncio.gather(*(member() for _ in range(5)))
        return most

    assert run(scene()) == 1


def test_ready_members_go_first_in_order_of_arrival_and_returning_ones_last():
    async def scene():
        floor, order = Floor(4), []
        await floor.enter(lambda: True)

        async def wait(name, turn):
            await turn
            order.append(name)
            floor.leave()

        tasks = [
            asyncio.create_task(wait("back", floor.come_back())),
            asyncio.create_task(wait("first", floor.enter(lambda: True))),
            asyncio.create_task(wait("second", floor.enter(lambda: True))),
        ]
        await asyncio.sleep(0)
        floor.leave()
        await asyncio.gather(*tasks)
        return order

    assert run(scene()) == ["first", "second", "back"]


def test_a_member_with_nothing_to_do_is_passed_over_until_poked():
    async def scene():
        floor, wanted = Floor(2), False
        idle = asyncio.create_task(floor.enter(lambda: wanted))
        await asyncio.sleep(0)
        await floor.enter(lambda: True)
        floor.leave()
        await asyncio.sleep(0)
        assert not idle.done()
        wanted = True
        floor.poke()
        await idle

    run(scene())


def test_quiet_once_all_members_wait_in_vain():
    async def scene():
        floor = Floor(2)
        waiting = [asyncio.create_task(floor.enter(lambda: False)) for _ in range(2)]
        await floor.quiet.wait()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(scene())


def test_not_quiet_while_a_run_is_out():
    async def scene():
        floor = Floor(2)
        await floor.enter(lambda: True)
        idle = asyncio.create_task(floor.enter(lambda: False))
        await asyncio.sleep(0)
        floor.leave()
        await asyncio.sleep(0)
        assert not floor.quiet.is_set()
        await floor.come_back()
        idle.cancel()
        await asyncio.gather(idle, return_exceptions=True)

    run(scene())


def test_a_cancelled_waiter_does_not_keep_the_floor():
    async def scene():
        floor = Floor(2)
        await floor.enter(lambda: True)
        leaving = asyncio.create_task(floor.enter(lambda: True))
        await asyncio.sleep(0)
        floor.leave()  # gives the floor to `leaving`, which is cancelled before it runs
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await floor.enter(lambda: True)

    run(scene())
