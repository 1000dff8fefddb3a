"""Triton kernels that dispatch tokens, see :mod:`~lightning_eplb.parallel.direct_exchange`, which launches them.

Numbers of tokens and rows are not specialised, or one rank would compile while the others wait for it.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def area(addresses, rank, offset, DTYPE: tl.constexpr):
    """Return the pointer to an area in the region of a rank."""
    area = (tl.load(addresses + rank) + offset).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(area, 16)


@triton.jit
def _slot(index, table, pair, mask, num_experts, HAS_TABLE: tl.constexpr):
    slot = tl.load(index + pair, mask=mask, other=0)
    if HAS_TABLE:
        expert = tl.where((slot >= 0) & (slot < num_experts), slot, num_experts)
        slot = tl.load(table + expert, mask=mask, other=0)
    return slot


@triton.jit
def write_header(addresses, tag, sequence, tokens, payload, ME: tl.constexpr, RANKS: tl.constexpr):
    """Write this rank's header into the regions of all ranks."""
    for d in tl.static_range(RANKS):
        header = area(addresses, d, 0, tl.int64) + ME * 8
        tl.store(header, tag.to(tl.int64))
        tl.store(header + 1, sequence.to(tl.int64))
        tl.store(header + 2, tokens.to(tl.int64))
        tl.store(header + 3, payload.to(tl.int64))


@triton.jit
def check_headers(addresses, errors, tag, sequence, ME: tl.constexpr, RANKS: tl.constexpr):
    """Note the first rank whose header is of another layer or trip."""
    header = area(addresses, ME, 0, tl.int64)
    for d in tl.static_range(RANKS):
        their_tag = tl.load(header + d * 8)
        their_sequence = tl.load(header + d * 8 + 1)
        is_mismatch = (their_tag != tag) | (their_sequence != sequence)
        if is_mismatch & (tl.load(errors) == 0):
            tl.store(errors + 1, tag.to(tl.int64))
            tl.store(errors + 2, sequence.to(tl.int64))
            tl.store(errors + 3, d)
            tl.store(errors + 4, their_tag)
            tl.store(errors + 5, their_sequence)
            tl.store(errors, 1)


@triton.jit(
    do_not_specialize=[
        *("tag", "sequence", "header_tokens", "payload", "tokens", "num_counts", "capacity"),
        *("slots_offset", "weights_offset", "rows_offset", "num_experts"),
    ],
    do_not_specialize_on_alignment=["index", "weights", "slots", "counts"],
)
def send_kernel(
    hidden,
    index,
    weights,
    table,
    slots,
    counts,
    addresses,
    tag,
    sequence,
    header_tokens,
    payload,
    tokens,
    num_counts,
    capacity,
    slots_offset,
    weights_offset,
    rows_offset,
    num_experts,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_BLOCK: tl.constexpr,
    ME: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if token == 0:
        write_header(addresses, tag, sequence, header_tokens, payload, ME, RANKS)
        for start in range(0, num_counts, 1024):
            place = start + tl.arange(0, 1024)
            tl.store(counts + place, tl.zeros((1024,), tl.int64), mask=place < num_counts)
    if token < tokens:
        if HAS_WEIGHTS:
            k = tl.arange(0, TOP_K_BLOCK)
            is_choice = k < TOP_K
            slot_K = _slot(index, table, token * TOP_K + k, is_choice, num_experts, HAS_TABLE)
            weight_K = tl.load(weights + token * TOP_K + k, mask=is_choice, other=0).to(SUM_DTYPE)
            if HAS_TABLE:
                tl.store(slots + token * TOP_K + k, slot_K, mask=is_choice)
            place = (ME * capacity + token) * TOP_K + k
            for d in tl.static_range(RANKS):
                tl.store(area(addresses, d, slots_offset, tl.int32) + place, slot_K, mask=is_choice)
                tl.store(area(addresses, d, weights_offset, SUM_DTYPE) + place, weight_K, mask=is_choice)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            is_inside = columns < WIDTH
            row = tl.load(hidden + token * WIDTH + columns, mask=is_inside)
            for d in tl.static_range(RANKS):
                if d != ME:
                    goes = 0
                    for choice in tl.static_range(TOP_K):
                        slot = _slot(index, table, token * TOP_K + choice, True, num_experts, HAS_TABLE)
                        goes += tl.where(slot // SLOTS == d, 1, 0)
                    if goes > 0:
                        rows = area(addresses, d, rows_offset, hidden.dtype.element_ty)
                        tl.store(rows + (ME * capacity + token) * WIDTH + columns, row, mask=is_inside)


@triton.jit(do_not_specialize=["tag", "sequence", "capacity", "slots_offset"])
def count_kernel(
    counts,
    report,
    errors,
    addresses,
    tag,
    sequence,
    capacity,
    slots_offset,
    TOP_K: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    ME: tl.constexpr,
    RANKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PAIRS: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
    HEADER: tl.constexpr,
):
    program = tl.program_id(0)
    rank, chunk = program // CHUNKS, program % CHUNKS
    header = area(addresses, ME, 0, tl.int64)
    slots = area(addresses, ME, slots_offset, tl.int32)
    num_pairs = tl.minimum(tl.load(header + rank * HEADER + 2), capacity) * TOP_K
    length = tl.cdiv(tl.cdiv(num_pairs, CHUNKS), PAIRS) * PAIRS
    first = chunk * length
    columns = tl.arange(0, SLOTS_BLOCK)
    total = tl.zeros((SLOTS_BLOCK,), tl.int32)
    start = first
    while start < tl.minimum(first + length, num_pairs):
        pair = start + tl.arange(0, PAIRS)
        slot = tl.load(slots + rank * capacity.to(tl.int64) * TOP_K + pair, mask=pair < num_pairs, other=NUM_SLOTS)
        total += tl.sum((slot[:, None] == columns[None, :]).to(tl.int32), axis=0)
        start += PAIRS
    tl.store(counts + program * SLOTS_BLOCK + columns, total)
    place = report + RANKS * HEADER + rank * NUM_SLOTS + columns
    tl.atomic_add(place, total.to(tl.int64), mask=(columns < NUM_SLOTS) & (total > 0))
    if program == 0:
        words = tl.arange(0, HEADER)
        for d in tl.static_range(RANKS):
            tl.store(report + d * HEADER + words, tl.load(header + d * HEADER + words))
        tl.store(report + RANKS * (HEADER + NUM_SLOTS) + words, tl.load(errors + words))
        check_headers(addresses, errors, tag, sequence, ME, RANKS)


@triton.jit(do_not_specialize=["num_served", "capacity", "slots_offset", "weights_offset"])
def place_kernel(
    counts,
    own_slots,
    pairs,
    weights,
    place,
    ends,
    addresses,
    num_served,
    capacity,
    slots_offset,
    weights_offset,
    TOP_K: tl.constexpr,
    FIRST_SLOT: tl.constexpr,
    ME: tl.constexpr,
    RANKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    OWN_PAIRS: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    HEADER: tl.constexpr,
):
    program = tl.program_id(0)
    rank, chunk = program // CHUNKS, program % CHUNKS
    header = area(addresses, ME, 0, tl.int64)
    slots = area(addresses, ME, slots_offset, tl.int32)
    their_weights = area(addresses, ME, weights_offset, weights.dtype.element_ty)
    turn = tl.arange(0, OWN_BLOCK)
    own_slot = FIRST_SLOT + tl.load(own_slots + turn, mask=turn < num_served, other=0)
    other = tl.arange(0, CHUNKS_BLOCK)
    is_inside = (other < RANKS * CHUNKS)[:, None] & (turn < num_served)[None, :]
    table = tl.load(counts + other[:, None] * SLOTS_BLOCK + own_slot[None, :], mask=is_inside, other=0)
    total = tl.sum(table, axis=0)
    before = tl.sum(tl.where(other[:, None] < program, table, 0), axis=0)
    end = tl.cumsum(total, 0)
    next_row = end - total + before
    own_slot = tl.where(turn < num_served, own_slot, -1)
    if program == 0:
        tl.store(ends + turn, end, mask=turn < num_served)
        for d in tl.static_range(RANKS):
            tl.store(ends + num_served + d, tl.load(header + d * HEADER + 2).to(tl.int32))
    num_pairs = tl.minimum(tl.load(header + rank * HEADER + 2), capacity) * TOP_K
    length = tl.cdiv(tl.cdiv(num_pairs, CHUNKS), PAIRS) * PAIRS
    first = chunk * length
    stop = tl.minimum(first + length, num_pairs)
    base = rank * capacity.to(tl.int64) * TOP_K
    start = first
    while start < stop:
        pair = start + tl.arange(0, OWN_PAIRS)
        is_pair = pair < stop
        slot = tl.load(slots + base + pair, mask=is_pair, other=-2)
        weight = tl.load(their_weights + base + pair, mask=is_pair, other=0)
        is_slot = (slot[:, None] == own_slot[None, :]).to(tl.int32)
        row = tl.sum(is_slot * (tl.cumsum(is_slot, axis=0) - 1 + next_row[None, :]), axis=1)
        is_own = tl.sum(is_slot, axis=1) > 0
        tl.store(place + base + pair, tl.where(is_own, row, -1), mask=is_pair)
        tl.store(pairs + row, (base + pair).to(tl.int32), mask=is_own)
        tl.store(weights + row, weight, mask=is_own)
        next_row += tl.sum(is_slot, axis=0)
        start += OWN_PAIRS


@triton.jit(
    do_not_specialize=["first", "stride", "capacity", "rows_offset"],
    do_not_specialize_on_alignment=["grad_weights", "pairs", "weights"],
)
def expand_kernel(
    hidden,
    old,
    out,
    grad_weights,
    pairs,
    weights,
    addresses,
    first,
    stride,
    capacity,
    rows_offset,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    ME: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    HAS_DOT: tl.constexpr,
    DIVISOR: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    token = tl.load(pairs + first + m).to(tl.int64) // TOP_K
    rank, token = token // stride, token % stride
    products = tl.zeros((BLOCK,), dtype=SUM_DTYPE)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < WIDTH
        if rank == ME:
            row = tl.load(hidden + token * WIDTH + columns, mask=is_inside, other=0)
        else:
            rows = area(addresses, ME, rows_offset, hidden.dtype.element_ty)
            row = tl.load(rows + (rank * capacity + token) * WIDTH + columns, mask=is_inside, other=0)
        if IS_WEIGHTED:
            if HAS_DOT:
                output = tl.load(old + m * WIDTH + columns, mask=is_inside, other=0).to(SUM_DTYPE)
                products += output * row.to(SUM_DTYPE)
            row = row.to(SUM_DTYPE) * tl.load(weights + first + m).to(SUM_DTYPE)
        if DIVISOR != 1:
            row = row.to(SUM_DTYPE) / DIVISOR
        tl.store(out + m * WIDTH + columns, row.to(out.dtype.element_ty), mask=is_inside)
    if HAS_DOT:
        tl.store(grad_weights + m, tl.sum(products, axis=0).to(grad_weights.dtype.element_ty))
