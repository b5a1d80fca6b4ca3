"""The genesis: its JSON form, what it refuses, the state it starts with."""

import json

import pytest
from msgspec import structs

from chain.genesis import Allocation, Genesis, check, from_json, to_json
from chain.params import Params
from chain.state import genesis_state, holdings
from tests.chain.ledger_kit import KEYS, genesis_of


def test_the_json_form_returns_the_same_genesis() -> None:
    genesis = genesis_of(faucet=5, faucet_grant=1, tau=(1, 2, 3))
    again = from_json(to_json(genesis))
    assert again == genesis
    assert again.chain_id == genesis.chain_id


def test_the_json_form_names_peers_and_spells_amounts_as_text() -> None:
    document = json.loads(to_json(genesis_of(validators=1, others=0)))
    assert document["validators"][0]["account"].startswith("12D3Koo")
    assert document["validators"][0]["stake"] == "1000000"
    assert document["accounts"][0]["amount"] == "10000000"


def test_another_content_has_another_chain_id() -> None:
    genesis = genesis_of()
    others = [
        structs.replace(genesis, name=b"other"),
        structs.replace(genesis, timestamp=genesis.timestamp + 1),
        structs.replace(genesis, params=structs.replace(Params(), draw_delay=3)),
        structs.replace(genesis, faucet=1),
        structs.replace(genesis, accounts=genesis.accounts[1:]),
    ]
    assert len({genesis.chain_id, *(other.chain_id for other in others)}) == 6


def changed(**fields: object) -> str:
    document = json.loads(to_json(genesis_of()))
    document.pop("chain_id")
    document.update(fields)
    return json.dumps(document)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "{" * 100_000,
        changed(faucet="-1"),
        changed(faucet="99999999999999999999999999"),
        changed(timestamp="soon"),
        changed(validators=[]),
        changed(accounts=[{"account": "nobody", "amount": "1"}]),
        changed(accounts=[{"account": "12D3KooWQJ", "amount": "1"}]),
        changed(params={"tau": [1, 2, 3], "draw_delay": 1}),
        changed(params={"tau": [1, 2]}),
        changed(params={"unknown": 1, "tau": [1, 2, 3]}),
        changed(chain_id="00" * 32),
        changed(accounts=[{"account": 5, "amount": "1"}]),
        changed(accounts=[{"account": None, "amount": "1"}]),
        changed(accounts=["nobody"]),
        changed(accounts={}),
        changed(validators=[{"account": True, "stake": "1", "onion_tip": "00"}]),
        changed(validators=[5]),
        changed(timestamp=1.5),
        changed(timestamp=True),
        changed(timestamp=2**80),
        changed(name=["a"]),
        changed(faucet=1.5),
        changed(faucet=None),
        changed(params=[]),
        changed(params={"tau": 5}),
        changed(params={"tau": "abc"}),
        changed(params={"tau": [1, 2, 3], "free_tasks": "yes"}),
        changed(params={"tau": [1, 2, 3], "epoch_blocks": 1.5}),
        changed(params={"tau": [1, 2, 3], "jail_window": 10, "jail_missed": 11}),
        changed(chain_id=5),
        "5",
        '"text"',
        "NaN",
    ],
)
def test_a_genesis_that_cannot_be_read_is_refused_with_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_json(text)


def twice(genesis: Genesis) -> Genesis:
    return structs.replace(genesis, validators=genesis.validators * 2)


def too_rich(genesis: Genesis) -> Genesis:
    allocation = Allocation(KEYS[0].account, 2**62)
    return structs.replace(genesis, accounts=(allocation, allocation))


def powerless(genesis: Genesis) -> Genesis:
    return structs.replace(genesis, params=structs.replace(genesis.params, min_stake=10**9))


def unreadable(genesis: Genesis) -> Genesis:
    return structs.replace(genesis, name=b"\xff")


def contradictory(genesis: Genesis) -> Genesis:
    return structs.replace(genesis, params=structs.replace(genesis.params, jail_missed=200))


@pytest.mark.parametrize("change", [twice, too_rich, powerless, unreadable, contradictory])
def test_a_genesis_that_no_chain_can_start_from_is_refused(change: object) -> None:
    genesis = change(genesis_of())  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"twice|more base units|least stake|UTF-8|jail_missed"):
        check(genesis)
    with pytest.raises(ValueError, match=r"."):
        genesis_state(genesis)


def test_the_state_at_genesis_holds_what_was_issued() -> None:
    genesis = genesis_of(faucet=77)
    state = genesis_state(genesis)
    assert sum(holdings(state).values()) == genesis.issued == state.chain.issued
    assert state.height == 0
    assert len(state.validators()) == 6


def test_allocations_to_one_account_add_up() -> None:
    genesis = genesis_of(validators=1, others=0)
    genesis = structs.replace(genesis, accounts=genesis.accounts * 2)
    state = genesis_state(genesis)
    assert state.account(KEYS[0].account).balance == 20_000_000
    assert sum(holdings(state).values()) == genesis.issued
