"""Who is blamed for a block without its signature: its validators, and nobody else."""

from chain.transactions import Bond, RegisterValidator
from tests.chain.ledger_kit import KEYS, ONIONS, STAKE, Ledger, genesis_of
from tests.chain.store_kit import final_blocks


def test_a_new_validator_is_not_blamed_for_the_block_before_it_joined() -> None:
    ledger, newcomer = Ledger(genesis_of()), KEYS[7]
    ledger.block((newcomer, RegisterValidator(ONIONS[newcomer.account].tip)), (newcomer, Bond(STAKE)))
    ledger.skip(2 * ledger.state.params.epoch_blocks)
    *_, (_, certificate, before, executed) = final_blocks(ledger)
    joined = executed.state.validator(newcomer.account)
    assert newcomer.account in executed.state.validators()
    assert joined is not None
    assert joined.missed == ()
    assert set(certificate.accounts(before.validators())) == set(before.validators().powers)
