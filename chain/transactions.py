"""Transactions: the closed union of payloads and the signed envelope that carries one.

A transaction whose envelope is valid is always included with a receipt; a payload that the ledger
refuses costs its fee and its nonce and changes nothing else. Duties (claims, commits, openings,
reveals, leases, evidence, votes on parameters) pay no fee: the ledger admits them only from those who owe them.
"""

from functools import cached_property
from typing import Annotated

from msgspec import Meta, structs

from chain.codec import AccountId, Hash, Record, SignatureBytes, Uint, decode, encode
from chain.hashing import digest
from chain.keys import PrivateKey, verify
from chain.params import Params

VERSION = 1
MAX_TRANSACTION_BYTES = 64 * 1024
SKETCH_BYTES = 3 * 32 * 4
MAX_PATIENCE = 3600
MAX_REDUNDANCY = 7

Index = Annotated[int, Meta(ge=0, le=2**20)]
BasisPoints = Annotated[int, Meta(ge=0, le=10_000)]
Sketch = Annotated[bytes, Meta(min_length=SKETCH_BYTES, max_length=SKETCH_BYTES)]
"""32 random-sign projections (float32, little-endian) of each of y, gx and gw."""
Proof = Annotated[tuple[Hash, ...], Meta(max_length=20)]
Kernel = Annotated[bytes, Meta(max_length=32)]
"""A kernel class: nothing, or the 32-byte digest of a machine's known answers."""
Shown = Annotated[bytes, Meta(max_length=512)]
"""Two signed inputs of a cell, in the encoding of the peers: addresses, senders, signatures."""
MAX_TOLERANCE = 100
"""Less than any result that was not computed is off by: nobody who has not executed a cell passes by tolerance."""
Times = Annotated[int, Meta(ge=1, le=MAX_TOLERANCE)]
Tolerance = tuple[Times, Times, Times]
"""Multiples of τ, of y, gx and gw."""
EXACT: Tolerance = (1, 1, 1)


class Transfer(Record, frozen=True, tag=1):
    """Move `amount` base units to account `to`."""

    to: AccountId
    amount: Uint


class Bond(Record, frozen=True, tag=2):
    """Lock `amount` of the sender's balance as stake."""

    amount: Uint


class Unbond(Record, frozen=True, tag=3):
    """Start to release `amount` of stake; it can be withdrawn after the unbonding period."""

    amount: Uint


class Withdraw(Record, frozen=True, tag=4):
    """Move every released unbonding of the sender to its balance."""


class RegisterValidator(Record, frozen=True, tag=5):
    """Join the validators with the tip of a hash onion; the envelope proves possession of the key."""

    onion_tip: Hash


class Unjail(Record, frozen=True, tag=6):
    """Return to the validator set after jailing."""


class Faucet(Record, frozen=True, tag=7):
    """Ask for the faucet's fixed grant, once per account, where the genesis allows it."""


class PostTask(Record, frozen=True, tag=8):
    """Post a training task with escrow. `price` is per cell; `depth` bounds unsettled steps."""

    manifest: Hash
    stages: Annotated[int, Meta(ge=1, le=256)]
    replicas: Annotated[int, Meta(ge=1, le=256)]
    steps: Annotated[int, Meta(ge=1, le=2**31)]
    microbatches: Annotated[int, Meta(ge=1, le=1024)]
    price: Uint
    escrow: Uint
    worker_bond: Uint
    audit_rate: BasisPoints
    depth: Annotated[int, Meta(ge=1, le=1024)]
    lifetime: Annotated[int, Meta(ge=1, le=2**31)]
    """Heights until the task's deadline."""
    patience: Annotated[int, Meta(ge=0, le=MAX_PATIENCE)]
    """Blocks that fetching a stage's weights and re-executing one cell may take on a slow machine."""
    redundancy: Annotated[int, Meta(ge=1, le=MAX_REDUNDANCY)] = 1
    """How many workers compute, claim and are paid for every cell."""
    kernel: Kernel = b""
    """The kernel class of the workers, where results are exact inside one only; empty where any may work."""


class TopUp(Record, frozen=True, tag=9):
    """Add `amount` to a task's escrow."""

    task: Hash
    amount: Uint


class CloseTask(Record, frozen=True, tag=10):
    """End the sender's task: settled work stays paid, the rest of the escrow returns."""

    task: Hash


class TakeSeat(Record, frozen=True, tag=11):
    """Apply for a seat in a task. `kernel` is the digest of the applicant's known-answer cell."""

    task: Hash
    kernel: Hash


class RenewLease(Record, frozen=True, tag=12):
    """Keep the sender's seat or application in a task alive for another lease period."""

    task: Hash


class LeaveSeat(Record, frozen=True, tag=13):
    """Give up the sender's seat or application; the bond returns when its claims have settled."""

    task: Hash


class Claim(Record, frozen=True):
    """A worker's commitment to its cells of one step.

    `root` is `chain.commitment.claim_root` over one salted leaf per entry of `cells` (ascending
    micro-batch indices; none, where the worker took part without any) and one for the optimiser's step;
    `state_before`/`state_after` are the stage's state roots around the step.
    """

    task: Hash
    generation: Index
    step: Uint
    stage: Index
    cells: Annotated[tuple[Index, ...], Meta(max_length=1024)]
    root: Hash
    state_before: Hash
    state_after: Hash


class SubmitClaims(Record, frozen=True, tag=14):
    """Commit to the results of one or more steps."""

    claims: Annotated[tuple[Claim, ...], Meta(min_length=1, max_length=16)]


class Commitment(Record, frozen=True):
    """`digest` binds the sender to the reveal of its re-execution of `audit` in `round`."""

    audit: Hash
    round: Annotated[int, Meta(ge=0, le=2)]
    digest: Hash


class Commit(Record, frozen=True, tag=15):
    """Commit to re-executions: round 0 the auditor, 1 the third opinion, 2 the voters."""

    entries: Annotated[tuple[Commitment, ...], Meta(min_length=1, max_length=32)]


class Trace(Record, frozen=True):
    """Content addresses of everything that one cell's execution read and produced."""

    x: Hash
    y: Hash
    gy: Hash
    gx: Hash
    gw: Hash
    boundaries: Hash
    state: Hash


class Opening(Record, frozen=True):
    """The worker's opening of the audited leaf, with its results sketched under the audit's key.

    `inputs` are those of the trace as they were signed by who sent them: whoever judges the cell has them from here.
    """

    audit: Hash
    salt: Hash
    trace: Trace
    proof: Proof
    sketch: Sketch
    inputs: Shown = b""


class Open(Record, frozen=True, tag=16):
    """Open audited cells after their auditors have committed."""

    entries: Annotated[tuple[Opening, ...], Meta(min_length=1, max_length=16)]


class Reveal(Record, frozen=True):
    """A re-execution's result: sketches under the audit's key and under the revealer's own key.

    `contradiction` says that the tensors behind the opened roots, fetched by hash, differ from the
    re-execution beyond the threshold although the opened sketch may not; `missing` that a claimed tensor is
    not, bit for bit, that of the re-execution, and that nobody gave it in time. `other_kernel` says that the revealer's
    machine is of another kernel class than the task's workers: it can only tell what is wide of the mark.
    `shown` are inputs, signed by who may send them, that an auditor was given in place of those of the opened trace;
    `misled` is a voter's word that they are so signed: what the auditor computed on them is no false result.
    `tolerance` are the multiples of τ, of y, gx and gw, that the revealer allows where its own results, executed again
    with other last bits, are that unsteady; they count in its own comparisons only.
    """

    audit: Hash
    round: Annotated[int, Meta(ge=0, le=2)]
    salt: Hash
    shared: Sketch
    own: Sketch
    contradiction: bool
    missing: bool
    other_kernel: bool = False
    shown: Shown = b""
    misled: bool = False
    tolerance: Tolerance = EXACT


class RevealAll(Record, frozen=True, tag=17):
    """Reveal committed re-executions."""

    entries: Annotated[tuple[Reveal, ...], Meta(min_length=1, max_length=16)]


class Evidence(Record, frozen=True, tag=18):
    """Two signed, conflicting consensus messages of one validator in one (height, view)."""

    first: Annotated[bytes, Meta(max_length=8192)]
    second: Annotated[bytes, Meta(max_length=8192)]


class RotateKey(Record, frozen=True, tag=19):
    """Move everything of the sender to `successor`, a key that was never used, and close the sender for good.

    `proof` is the successor's signature over `rotation_bytes`; `onion_tip` is what it will validate with.
    """

    successor: AccountId
    onion_tip: Hash
    proof: SignatureBytes


class VoteParams(Record, frozen=True, tag=20):
    """Stand for these parameters, all of them; those in force take a validator's standing vote back."""

    params: Params


class WatchWorker(Record, frozen=True, tag=21):
    """Have every cell of a worker of the sender's task audited for a while; nothing else follows from it."""

    task: Hash
    worker: AccountId


Payload = (
    Transfer | Bond | Unbond | Withdraw | RegisterValidator | Unjail | Faucet
    | PostTask | TopUp | CloseTask | TakeSeat | RenewLease | LeaveSeat
    | SubmitClaims | Commit | Open | RevealAll | Evidence | RotateKey | VoteParams | WatchWorker
)  # fmt: skip

DUTIES = (RenewLease, SubmitClaims, Commit, Open, RevealAll, Evidence, VoteParams)
"""Free of fees for those who may owe them; a vote is, so that no fee can outvote those who would lower it."""


class Unsigned(Record, frozen=True):
    """Everything of a transaction that its signature covers."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    chain_id: Hash
    sender: AccountId
    nonce: Uint
    valid_from: Uint
    valid_until: Uint
    fee: Uint
    memo: Annotated[bytes, Meta(max_length=64)]
    payload: Payload


class Transaction(Record, frozen=True, dict=True):
    """A signed transaction; `tx_id` names it."""

    body: Unsigned
    signature: SignatureBytes

    @cached_property
    def encoded(self) -> bytes:
        """The canonical bytes, made once."""
        return encode(self)

    @cached_property
    def tx_id(self) -> bytes:
        """The 32-byte id: digest of the whole signed envelope."""
        return digest("transaction", self.encoded)

    def is_signed(self) -> bool:
        """Whether the signature is the sender's."""
        return verify(self.body.sender, signing_bytes(self.body), self.signature)


def signing_bytes(body: Unsigned) -> bytes:
    """Return the domain-separated digest that a sender signs."""
    return digest("transaction body", encode(body))


def sign(key: PrivateKey, body: Unsigned) -> Transaction:
    """Return `body` signed by `key`."""
    return Transaction(body, key.sign(signing_bytes(body)))


def rotation_bytes(chain_id: bytes, account: bytes) -> bytes:
    """Return the domain-separated digest by whose signature a key consents to succeed `account`."""
    return digest("rotate key", chain_id, account)


def decode_transaction(data: bytes) -> Transaction:
    """Return the transaction that `data` encodes; raise `DecodeError`."""
    return decode(Transaction, data, MAX_TRANSACTION_BYTES)


def reveal_commitment(account: bytes, reveal: Reveal) -> bytes:
    """Return the digest that `account` must have committed to before it may send `reveal`.

    What speaks of an opening is left out: that comes after the commitment.
    """
    before = structs.replace(reveal, contradiction=False, missing=False, shown=b"", misled=False, tolerance=EXACT)
    return digest("reveal", account, encode(before))
