"""The gradient kernels' programs for GPUs, in Triton; ``hpctrain.kernels.device`` launches them.

Most handle one chunk each: a row (address of the first source element, first destination element, number of
elements) of an int64 table, so that one launch reads any number of tensors. Loads and stores are of 16 bytes a thread
wherever addresses allow it, and nothing is ever assumed of an address that its program has not tested.

Triton gives annotations a meaning of its own, so there are none but its own.
"""

import triton
import triton.language as tl

#: Elements that a program handles in one turn of its loop, 8 a thread.
BLOCK = tl.constexpr(1024)
#: Of one program: four warps.
THREADS = tl.constexpr(128)
#: Rows that one program adds up at once: 8 loads of 16 bytes under way in each thread. More would not fit registers.
ROWS_AT_ONCE = 8
INF = tl.constexpr(float("inf"))


@triton.jit
def _chunk(table):
    """(address, start, count) of this program's chunk."""
    row = table + 3 * tl.program_id(0)
    return tl.load(row), tl.load(row + 1), tl.load(row + 2).to(tl.int32)


@triton.jit
def _in_vectors(address, start):
    return (address % 16 == 0) & (start % 8 == 0)


@triton.jit
def _pointer(address, kind: tl.constexpr):
    return address.to(tl.pointer_type(kind))


@triton.jit
def _vector_pointer(address, kind: tl.constexpr):
    """For an address that is a multiple of 16.

    The compiler takes the hint as a fact about the value wherever else that is used, a test of it included. So the
    hint goes to a value of its own, of which it is true in any case.
    """
    return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(kind)), 16)


@triton.jit
def _narrow_block(source, target, at, mask, scale):
    value = tl.load(source + at, mask=mask, eviction_policy="evict_first")
    tl.store(target + at, (value * scale).to(target.dtype.element_ty), mask=mask)


@triton.jit
def _narrow_chunk(source, target, count, scale):
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        _narrow_block(source, target, first + lane, True, scale)
    if whole < count:
        _narrow_block(source, target, whole + lane, whole + lane < count, scale)


@triton.jit
def narrow(table, wire, scale):
    address, start, count = _chunk(table)
    if _in_vectors(address, start):
        _narrow_chunk(_vector_pointer(address, tl.float32), wire + start // 8 * 8, count, scale)
    else:
        _narrow_chunk(_pointer(address, tl.float32), wire + start, count, scale)


@triton.jit
def _feedback_block(source, residual, target, at, mask, scale, inverse):
    value = tl.load(source + at, mask=mask, eviction_policy="evict_first") + tl.load(residual + at, mask=mask)
    sent = (value * scale).to(target.dtype.element_ty)
    left = value - sent.to(tl.float32) * inverse
    tl.store(target + at, sent, mask=mask)
    tl.store(residual + at, tl.where(tl.abs(left) < INF, left, 0.0), mask=mask)


@triton.jit
def _feedback_chunk(source, residual, target, count, scale, inverse):
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        _feedback_block(source, residual, target, first + lane, True, scale, inverse)
    if whole < count:
        _feedback_block(source, residual, target, whole + lane, whole + lane < count, scale, inverse)


@triton.jit
def narrow_with_feedback(table, residual, wire, scale, inverse):
    address, start, count = _chunk(table)
    if _in_vectors(address, start):
        at = start // 8 * 8
        _feedback_chunk(_vector_pointer(address, tl.float32), residual + at, wire + at, count, scale, inverse)
    else:
        _feedback_chunk(_pointer(address, tl.float32), residual + start, wire + start, count, scale, inverse)


@triton.jit
def _count_block(source, wire, at, mask, smallest_normal):
    """Overflow, underflow, subnormal, nonfinite: 0 or 1 an element. What the mask leaves out counts nowhere."""
    value = tl.abs(tl.load(source + at, mask=mask, other=0.0))
    sent = tl.abs(tl.load(wire + at, mask=mask, other=0.0).to(tl.float32))
    finite, sent_finite = value < INF, sent < INF
    overflow = (finite & (sent_finite == 0)).to(tl.int32)
    underflow = ((value != 0) & (sent == 0)).to(tl.int32)
    subnormal = ((sent > 0) & (sent < smallest_normal)).to(tl.int32)
    return overflow, underflow, subnormal, (finite == 0).to(tl.int32)


@triton.jit
def _count_chunk(source, wire, counts, count, smallest_normal):
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    rest = whole + lane
    overflow, underflow, subnormal, nonfinite = _count_block(source, wire, rest, rest < count, smallest_normal)
    for first in range(0, whole, BLOCK):
        more = _count_block(source, wire, first + lane, True, smallest_normal)
        overflow += more[0]
        underflow += more[1]
        subnormal += more[2]
        nonfinite += more[3]
    tl.store(counts, tl.sum(overflow))
    tl.store(counts + 1, tl.sum(underflow))
    tl.store(counts + 2, tl.sum(subnormal))
    tl.store(counts + 3, tl.sum(nonfinite))


@triton.jit
def count(table, wire, counts, smallest_normal):
    """``counts`` [chunks, 4] int32."""
    address, start, count = _chunk(table)
    row = counts + 4 * tl.program_id(0)
    if _in_vectors(address, start):
        _count_chunk(_vector_pointer(address, tl.float32), wire + start // 8 * 8, row, count, smallest_normal)
    else:
        _count_chunk(_pointer(address, tl.float32), wire + start, row, count, smallest_normal)


@triton.jit
def _widen_block(source, target, at, mask, scale):
    """(largest magnitude, sum of squares) of every 4 elements; inf for NaN. What the mask leaves out is 0."""
    value = tl.load(source + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32) * scale
    tl.store(target + at, value, mask=mask)
    magnitude, wide = tl.where(value == value, tl.abs(value), INF), value.to(tl.float64)
    # Along the inner axis lies what one thread holds: nothing travels between threads here.
    largest = tl.max(tl.reshape(magnitude, (BLOCK // 4, 4)), 1)
    return largest, tl.sum(tl.reshape(wide * wide, (BLOCK // 4, 4)), 1)


@triton.jit
def _widen_chunk(source, target, partial, partials, count, scale):
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    magnitude, squares = _widen_block(source, target, whole + lane, whole + lane < count, scale)
    for first in range(0, whole, BLOCK):
        more = _widen_block(source, target, first + lane, True, scale)
        magnitude = tl.maximum(magnitude, more[0])
        squares += more[1]
    tl.store(partial, tl.max(magnitude).to(tl.float64))
    tl.store(partial + partials, tl.sum(squares))


@triton.jit
def widen(table, out, partial, partials, scale, KIND: tl.constexpr):
    """``partial`` [2, partials] float64: largest magnitude and sum of squares of each chunk, ``KIND`` the parts'."""
    address, start, count = _chunk(table)
    mine = partial + tl.program_id(0)
    if _in_vectors(address, start):
        _widen_chunk(_vector_pointer(address, KIND), out + start // 8 * 8, mine, partials, count, scale)
    else:
        _widen_chunk(_pointer(address, KIND), out + start, mine, partials, count, scale)


@triton.jit
def finish_widen(partial, partials, found):
    """``found`` [2] from ``partial`` [2, partials], in one order whatever the GPU; one program."""
    lane = tl.arange(0, BLOCK)
    magnitude = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, partials, BLOCK):
        at = first + lane
        magnitude = tl.maximum(magnitude, tl.load(partial + at, mask=at < partials, other=0.0))
        squares += tl.load(partial + partials + at, mask=at < partials, other=0.0)
    tl.store(found, tl.max(magnitude))
    tl.store(found + 1, tl.sum(squares))


@triton.jit
def _row(addresses, row, rows, lane, end, KIND: tl.constexpr, VECTORS: tl.constexpr):
    """Elements ``lane`` below ``end`` in float32; -0.0, which changes no sum, where there is no such row."""
    address = tl.load(addresses + tl.minimum(row, rows - 1))
    pointer = _vector_pointer(address, KIND) if VECTORS else _pointer(address, KIND)
    return tl.load(pointer + lane, mask=lane < tl.where(row < rows, end, 0), other=-0.0).to(tl.float32)


@triton.jit
def _tree(addresses, row, rows, lane, end, AT_ONCE: tl.constexpr, KIND: tl.constexpr, VECTORS: tl.constexpr):
    if AT_ONCE == 1:
        return _row(addresses, row, rows, lane, end, KIND, VECTORS)
    else:
        lower = _tree(addresses, row, rows, lane, end, AT_ONCE // 2, KIND, VECTORS)
        return lower + _tree(addresses, row + AT_ONCE // 2, rows, lane, end, AT_ONCE // 2, KIND, VECTORS)


@triton.jit
def _sum_singly(addresses, target, first, length, row, rows, AT_ONCE: tl.constexpr, KIND: tl.constexpr):
    """One element a thread at a time: eight rows of more would not fit the registers."""
    for start in range(first, tl.minimum(first + BLOCK, length), THREADS):
        lane = start + tl.arange(0, THREADS)
        whole = _tree(addresses, row, rows, lane, length, AT_ONCE, KIND, False)
        tl.store(target + lane, whole.to(target.dtype.element_ty), mask=lane < length)


@triton.jit
def sum_rows(addresses, out, length, rows, AT_ONCE: tl.constexpr, KIND: tl.constexpr, VECTORS: tl.constexpr):
    """``out`` [groups, length]: each row the sum of up to ``AT_ONCE`` of the ``rows`` of ``KIND`` at ``addresses``.

    ``VECTORS``: every row, of ``out`` too, starts at a multiple of 16 bytes.
    """
    first, group = tl.program_id(0) * BLOCK, tl.program_id(1)
    target = out + group.to(tl.int64) * (length // 8 * 8 if VECTORS else length)
    row = group * AT_ONCE
    if VECTORS:
        if first + BLOCK <= length:
            lane = first + tl.arange(0, BLOCK)
            whole = _tree(addresses, row, rows, lane, first + BLOCK, AT_ONCE, KIND, True)
            tl.store(target + lane, whole.to(out.dtype.element_ty))
        else:
            _sum_singly(addresses, target, first, length, row, rows, AT_ONCE, KIND)
    else:
        _sum_singly(addresses, target, first, length, row, rows, AT_ONCE, KIND)
