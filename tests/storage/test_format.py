from __future__ import annotations

import hashlib
import json
import struct
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage.format import (
    FIRST_READ_BYTES,
    LAYOUT,
    ChunkHeader,
    CorruptChunk,
    LayerShape,
    RangeSource,
    encode,
    encode_into,
    encoded_size,
    read_chunk,
    seal,
)
from storage.framing import build_head, build_tail, tail_bytes
from storage.header import header_from_json, header_to_json
from storage.keys import chain
from storage.layout import Payload

ROOT = "ab" * 32
shapes = st.builds(LayerShape, num_kv_heads=st.integers(1, 5), k_dim=st.integers(1, 40), v_dim=st.integers(1, 40))
headers = st.builds(
    lambda *parts: make_header(*parts),
    st.lists(shapes, min_size=1, max_size=4),
    st.integers(1, 20),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(0, 3),
)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.just(1 << 70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)

SMALL = (LayerShape(num_kv_heads=2, k_dim=4, v_dim=6),) * 3


def make_header(layers=SMALL, num_tokens=5, dtype="float32", chunk=0):
    """The `chunk`-th chunk of a conversation whose chunks hold `num_tokens` tokens."""
    start = chunk * num_tokens
    marks = chain(ROOT, range(start + num_tokens), num_tokens, cuts=(start + 1,))
    return ChunkHeader(
        key=marks[-1][1],
        parent=dict(marks)[start] if start else None,
        root=ROOT,
        start=start,
        context_start=2,
        token_ids=tuple(range(start, start + num_tokens)),
        marks=tuple(mark for mark in marks if mark[0] > start),
        dtype=dtype,
        layers=tuple(layers),
    )


def make_layers(header, seed=0):
    values = np.random.default_rng(seed)

    def draw(heads, dim):
        size = (heads, header.num_tokens, dim)
        if header.dtype == "float32":
            return values.standard_normal(size).astype(np.float32)
        return values.integers(0, 1 << 16, size).astype(np.uint16)

    return [(draw(shape.num_kv_heads, shape.k_dim), draw(shape.num_kv_heads, shape.v_dim)) for shape in header.layers]


def assert_holds(reader, layers):
    for i, (k, v) in enumerate(layers):
        stored_k, stored_v = reader.layer(i)
        assert stored_k.dtype == k.dtype
        assert np.array_equal(stored_k.view(np.uint8), k.view(np.uint8))
        assert np.array_equal(stored_v.view(np.uint8), v.view(np.uint8))


class TestRoundTrip:
    @given(header=headers)
    @settings(max_examples=60, deadline=None)
    def test_any_shape(self, header):
        layers = make_layers(header)
        data = encode(header, layers)
        assert len(data) == encoded_size(header)
        reader = read_chunk(data)
        assert reader.header == header
        reader.verify()
        assert_holds(reader, layers)
        assert reader.num_bytes == len(data)

    @given(header=headers)
    @settings(max_examples=40, deadline=None)
    def test_any_arrow_reader_opens_it(self, header):
        layers = make_layers(header)
        file = pa.ipc.open_file(pa.py_buffer(encode(header, layers)))
        assert file.num_record_batches == len(layers)
        assert file.schema.names == ["k", "v"]
        for i, (k, v) in enumerate(layers):
            batch = file.get_batch(i)
            batch.validate(full=True)
            assert batch.column("k").to_pylist() == [head.tobytes() for head in k]
            assert batch.column("v").to_pylist() == [head.tobytes() for head in v]

    def test_the_streaming_arrow_reader_too(self):
        header = make_header()
        layers = make_layers(header)
        stream = encode(header, layers)[8:]  # an Arrow file is a stream between two magics
        batches = list(pa.ipc.open_stream(pa.py_buffer(stream)))
        assert [batch.column("v")[1].as_py() for batch in batches] == [v[1].tobytes() for _, v in layers]

    def test_one_layer_is_one_arrow_message_at_its_index(self):
        header = make_header()
        layers = make_layers(header)
        data = encode(header, layers)
        schema = pa.ipc.read_schema(pa.py_buffer(data[8:]))
        _, index = header_from_json(schema.metadata[b"reprise"])
        (metadata_bytes,) = struct.unpack_from("<i", data, 12)
        for (offset, length, _), (k, _) in zip(index, layers):
            at = 16 + metadata_bytes + offset
            message = pa.ipc.read_message(pa.py_buffer(data[at : at + length]))
            batch = pa.ipc.read_record_batch(message, schema)
            assert batch.column("k")[0].as_py() == k[0].tobytes()

    def test_metadata_says_what_it_is(self):
        document = pa.ipc.open_file(pa.py_buffer(encode(make_header(), make_layers(make_header())))).schema.metadata
        assert f'"layout":"{LAYOUT}"'.encode() in document[b"reprise"]
        assert b'"positions":"free"' in document[b"reprise"]

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, pa.py_buffer, np.asarray])
    def test_reads_any_buffer_without_a_copy(self, kind):
        header = make_header()
        layers = make_layers(header)
        lent = kind(encode(header, layers))
        k, v = read_chunk(lent).layer(1)
        assert np.shares_memory(k, np.frombuffer(lent, dtype=np.uint8))
        assert np.array_equal(v, layers[1][1])
        assert not k.flags.writeable

    def test_data_is_aligned_to_64_bytes(self):
        header = make_header(layers=(LayerShape(num_kv_heads=3, k_dim=7, v_dim=5),) * 2, num_tokens=3)
        out = np.empty(encoded_size(header) + 64, dtype=np.uint8)
        aligned = out[-out.ctypes.data % 64 :][: encoded_size(header)]
        for k, v in encode_into(header, aligned):
            assert k.ctypes.data % 64 == 0
            assert v.ctypes.data % 64 == 0

    def test_layers_need_not_be_contiguous(self):
        header = make_header()
        layers = make_layers(header)
        scattered = [(np.repeat(k, 2, axis=1)[:, ::2], np.asfortranarray(v)) for k, v in layers]
        assert np.array_equal(encode(header, scattered), encode(header, layers))

    @pytest.mark.parametrize("as_type", [np.int16, np.float16])
    def test_sixteen_bits_are_taken_as_patterns(self, as_type):
        header = make_header(dtype="bfloat16")
        layers = make_layers(header)
        assert_holds(read_chunk(encode(header, [(k.view(as_type), v.view(as_type)) for k, v in layers])), layers)

    def test_uint32_is_taken_for_float32(self):
        header = make_header()
        layers = make_layers(header)
        assert_holds(read_chunk(encode(header, [(k.view(np.uint32), v.view(np.uint32)) for k, v in layers])), layers)

    def test_layers_in_order(self):
        header = make_header()
        layers = make_layers(header)
        assert all(np.array_equal(k, kv[0]) for (k, _), kv in zip(read_chunk(encode(header, layers)).layers(), layers))

    def test_arrays_outlive_the_reader(self):
        header = make_header()
        layers = make_layers(header)
        reader = read_chunk(encode(header, layers))
        k, _ = reader.layer(0)
        reader.close()
        assert np.array_equal(k, layers[0][0])


class TestTheSameBytesAsEver:
    """Chunks outlive the code that wrote them: what is cached or patched in place must not change a byte."""

    def test_a_fixed_chunk(self):
        header = make_header()
        counting = [np.arange(2 * 5 * dim, dtype=np.float32).reshape(2, 5, dim) for dim in (4, 6)]
        digest = hashlib.sha256(encode(header, [tuple(counting)] * 3)).hexdigest()
        assert digest == "b501e3dca27d718c3f78d979a26660b1af88bada856e6a8d61f9050bf8bee172"

    @given(header=headers)
    @settings(max_examples=40, deadline=None)
    def test_the_ends_are_those_built_in_one_piece(self, header):
        assert_ends_are_plain(header)

    @given(text=st.text())
    @example(text='"index":[[0,1,"0000000000000000"]]')
    @example(text='","index":[')
    @settings(max_examples=40, deadline=None)
    def test_whatever_its_texts_say(self, text):
        header = make_header(chunk=1)
        end, _ = header.marks[-1]
        assert_ends_are_plain(
            replace(header, key=text, parent=text, root=text, marks=(*header.marks[:-1], (end, text)))
        )

    @given(header=headers)
    @settings(max_examples=40, deadline=None)
    def test_the_length_of_a_tail_is_known_before_it_is_built(self, header):
        payload = Payload.of(header)
        head = build_head(header_to_json(header, payload.index))
        tail = build_tail(head, payload.index, payload.frames)
        assert tail_bytes(len(head), len(payload.frames)) == len(tail)


class TestInPlace:
    @given(header=headers, dirt=st.integers(0, 255))
    @settings(max_examples=30, deadline=None)
    def test_written_in_place_and_sealed_equals_encoded(self, header, dirt):
        layers = make_layers(header)
        out = np.full(encoded_size(header), dirt, dtype=np.uint8)  # a buffer that was used before
        for (k_view, v_view), (k, v) in zip(encode_into(header, out), layers):
            k_view[...], v_view[...] = k, v
        seal(header, out)
        assert np.array_equal(out, encode(header, layers))

    def test_is_no_chunk_before_it_is_sealed(self):
        header = make_header()
        out = np.zeros(encoded_size(header), dtype=np.uint8)
        encode_into(header, out)
        with pytest.raises(CorruptChunk):
            read_chunk(out)

    @pytest.mark.parametrize("change", [lambda out: out[1:], lambda out: out.view(np.int8), lambda out: out[::-1]])
    def test_refuses_another_buffer(self, change):
        header = make_header()
        out = change(np.zeros(encoded_size(header), dtype=np.uint8))
        for write in (encode_into, seal):
            with pytest.raises(ValueError, match=f"uint8 array of {encoded_size(header)} bytes"):
                write(header, out)


class TestDamage:
    def test_every_flipped_byte_is_seen(self):
        """Whatever byte is flipped: opening fails, or the layers still hold what was written; verify() always fails."""
        header = make_header(layers=(LayerShape(num_kv_heads=1, k_dim=3, v_dim=2),) * 2, num_tokens=2)
        layers = make_layers(header)
        data = encode(header, layers)
        for position in range(len(data)):
            damaged = data.copy()
            damaged[position] ^= 1 << (position % 8)
            with pytest.raises(CorruptChunk):
                read_and_verify(damaged)
            assert_never_wrong(damaged, header, layers)

    def test_every_truncation_is_seen(self):
        header = make_header(layers=(LayerShape(num_kv_heads=1, k_dim=3, v_dim=2),) * 2, num_tokens=2)
        data = encode(header, make_layers(header))
        for length in range(len(data)):
            with pytest.raises(CorruptChunk):
                read_chunk(data[:length])
        with pytest.raises(CorruptChunk):
            read_chunk(np.append(data, np.uint8(0)))

    @given(header=headers, data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_any_overwritten_range_is_seen(self, header, data):
        layers = make_layers(header)
        encoded = encode(header, layers)
        damaged = encoded.copy()
        start = data.draw(st.integers(0, len(damaged) - 1))
        noise = data.draw(st.binary(min_size=1, max_size=300))[: len(damaged) - start]
        damaged[start : start + len(noise)] = np.frombuffer(noise, dtype=np.uint8)
        if np.array_equal(damaged, encoded):
            return
        with pytest.raises(CorruptChunk):
            read_and_verify(damaged)
        assert_never_wrong(damaged, header, layers)

    @given(noise=st.binary(max_size=2000), keep=st.integers(0, 200))
    @settings(max_examples=60, deadline=None)
    def test_noise_is_no_chunk(self, noise, keep):
        prefix = encode(make_header(), make_layers(make_header()))[:keep].tobytes()
        with pytest.raises(CorruptChunk):
            read_chunk(prefix + noise)

    def test_swapped_layers_are_seen(self):
        header = make_header()
        data = encode(header, make_layers(header))
        _, index = header_from_json(pa.ipc.read_schema(pa.py_buffer(data[8:])).metadata[b"reprise"])
        head = 16 + struct.unpack_from("<i", data, 12)[0]
        (first, length, _), (second, _, _) = index[:2]
        swapped = data.copy()
        swapped[head + first :][:length] = data[head + second :][:length]
        swapped[head + second :][:length] = data[head + first :][:length]
        for i in (0, 1):
            with pytest.raises(CorruptChunk):
                read_chunk(swapped).layer(i)

    def test_a_plain_arrow_file_is_no_chunk(self):
        sink = pa.BufferOutputStream()
        table = pa.table({"k": [b"x" * 500], "v": [b"y"]})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(CorruptChunk):
            read_chunk(sink.getvalue())

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'"format":1', b'"format":2'),
            (b'"positions":"free"', b'"positions":"rope"'),
            (LAYOUT.encode(), b"another-layout"),
            (b'"codec":"raw"', b'"codec":"zip"'),
            (b'"dtype":"float32"', b'"dtype":"float64"'),
            (b'"layers":[[2,4,6]', b'"layers":[[2,4,7]'),
            (b'"layers":[[2,4,6]', b'"layers":[[2147483647,2147483647,6]'),
            (b'"layers":[[2,4,6]', b'"layers":[[268435456,1,1]'),
            (b'"layers":[[2,4,6]', b'"layers":[[0,4,6]'),
            (b'"layers":[[2,4,6]', b'"layers":[["a",4,6]'),
            (b'"index":[[0,', b'"index":[[64,'),
            (b'"index":[[', b'"xedni":[['),
            (b'"token_ids":[0,', b'"token_ids":['),
            (b'"token_ids":[0,1', b'"token_ids":[0,null'),
            (b'{"format"', b'["format"'),
            (b'"marks":[[1,', b'"marks":[[9,'),
            (b'"start":0', b'"start":"0"'),
            (b'"start":0', b'"start":0.0'),
            (b'"parent":null', b'"parent":7'),
            (b'"layers":[[2,4,6]', b'"layers":[[2,4.0,6]'),
            (b'"layers":[[2,4,6]', b'"layers":[[2,4,6,6]'),
            (b'"layers":[[2,4,6]', b'"layers":[[2,4]'),
            (b'"layers":[[2,4,6]', b'"layers":[[true,4,6]'),
            (b'"layers":[[2,4,6]', b'"layers":[[2,-4,6]'),
            (b'"layers":[[2,4,6]', b'"layers":["246"'),
            (b'"layers":[[2,4,6],', b'"layers":['),
            (b'"token_ids":[0,1', b'"token_ids":[0,-1'),
            (b'"token_ids":[0,1', b'"token_ids":[0,true'),
            (b'"marks":[[1,', b'"marks":[[1.0,'),
            (b'"marks":[[1,', b'"marks":[[1,1,'),
            (b'"marks":[[1,"', b'"marks":[[1],["'),
            (b'"marks":[[1,"', b'"marks":[[1,8],[3,"'),
            (b'"index":[[0,', b'"index":[[0.0,'),
            (b'"index":[[0,', b'"index":[[-0.0,'),
            (b'"index":[[0,', b'"index":[[false,'),
            (b'"index":[[0,', b'"index":[[0,0,'),
            (b'"index":[[0,', b'"index":[['),
            (b'"index":[', b'"index":[],"xedni":['),
            (b'"index":[', b'"index":7,"xedni":['),
        ],
    )
    def test_a_well_signed_head_that_makes_no_sense(self, old, new):
        """Checksums keep accidents away; a writer of another version, or a wrong one, has good checksums."""
        header = make_header()
        data = encode(header, make_layers(header))
        document = stored_document(data)
        assert old in document
        with pytest.raises(CorruptChunk):
            read_chunk(forged(data, document.replace(old, new)))

    @given(data=st.data())
    @settings(max_examples=200, deadline=None)
    def test_a_well_signed_head_with_anything_in_it(self, data):
        """Whatever stands in one place of the document: opening says CorruptChunk, or nothing; never another error."""
        header = make_header()
        encoded = encode(header, make_layers(header))
        document = json.loads(stored_document(encoded))
        holder, place = document, data.draw(st.sampled_from(sorted(document)))
        while isinstance(holder[place], list) and data.draw(st.booleans()):
            holder, place = holder[place], data.draw(st.integers(0, len(holder[place]) - 1))
        holder[place] = data.draw(anything)
        with suppress(CorruptChunk):
            read_chunk(forged(encoded, json.dumps(document).encode()))


class TestRanges:
    def test_one_read_for_the_head_and_one_per_layer(self):
        header = make_header(layers=(LayerShape(num_kv_heads=4, k_dim=256, v_dim=128),) * 4, num_tokens=64)
        layers = make_layers(header)
        data, reads = encode(header, layers).tobytes(), []
        reader = read_chunk(recorded(data, reads))
        assert reads == [(0, FIRST_READ_BYTES)]
        assert_holds(reader, layers)
        assert len(reads) == 1 + len(layers)
        assert reader.header == header

    def test_a_small_chunk_is_one_read(self):
        header = make_header()
        layers = make_layers(header)
        data, reads = encode(header, layers).tobytes(), []
        reader = read_chunk(recorded(data, reads))
        reader.verify()
        assert reads == [(0, len(data))]

    def test_a_head_longer_than_the_first_read(self):
        header = make_header(layers=(LayerShape(num_kv_heads=1, k_dim=1, v_dim=1),), num_tokens=20_000)
        layers = make_layers(header)
        data, reads = encode(header, layers).tobytes(), []
        reader = read_chunk(recorded(data, reads))
        assert len(reads) == 2
        assert reader.header == header
        assert_holds(reader, layers)

    def test_a_source_that_ends_early(self):
        header = make_header(layers=(LayerShape(num_kv_heads=4, k_dim=256, v_dim=128),) * 4, num_tokens=64)
        data = encode(header, make_layers(header)).tobytes()
        for cut in (1000, 70_000, len(data) - 200_000):
            source = RangeSource(read=lambda at, size, cut=cut: data[:cut][at : at + size], num_bytes=len(data))
            with pytest.raises(CorruptChunk):
                read_chunk(source).verify()

    def test_what_the_source_raises_comes_through(self):
        def fail(offset, length):
            raise ConnectionError("gone")

        with pytest.raises(ConnectionError, match="gone"):
            read_chunk(RangeSource(read=fail, num_bytes=10_000))

    def test_close_reaches_the_source(self):
        header = make_header()
        data, closed = encode(header, make_layers(header)), []
        source = RangeSource(
            read=lambda at, size: data[at : at + size], num_bytes=len(data), close=lambda: closed.append(True)
        )
        read_chunk(source).close()
        assert closed == [True]


class TestHeader:
    @pytest.mark.parametrize(
        "change",
        [
            {"token_ids": ()},
            {"layers": ()},
            {"start": -1},
            {"start": 5, "parent": None},
            {"context_start": -1},
            {"dtype": "int8"},
            {"codec": "zstd"},
            {"marks": ()},
            {"marks": ((5, "other"),)},
            {"marks": ((3, "a"), (2, "b"), (5, make_header().key))},
            {"marks": ((0, "a"), (5, make_header().key))},
        ],
    )
    def test_refuses_what_cannot_be(self, change):
        with pytest.raises(ValueError, match=r"chunk|start|dtype|marks"):
            replace(make_header(), **change)

    def test_refuses_a_layer_of_nothing(self):
        with pytest.raises(ValueError, match="at least one head"):
            LayerShape(num_kv_heads=0, k_dim=4, v_dim=4)

    @given(header=headers)
    @settings(max_examples=30, deadline=None)
    def test_json_keeps_everything(self, header):
        index = tuple((i, 10 * i, (1 << 64) - 1 - i) for i in range(len(header.layers)))
        assert header_from_json(header_to_json(header, index)) == (header, index)

    def test_refuses_layers_that_are_not_as_described(self):
        header = make_header()
        layers = make_layers(header)
        k, v = layers[0]
        wrong = [
            layers[:2],
            [(v, k), *layers[1:]],
            [(k.astype(np.float64), v), *layers[1:]],
            [(k[:, :4], v), *layers[1:]],
        ]
        for bad in wrong:
            with pytest.raises(ValueError, match=r"layer"):
                encode(header, bad)

    def test_refuses_more_than_arrow_can_hold(self):
        header = make_header(layers=(LayerShape(num_kv_heads=1 << 12, k_dim=1 << 18, v_dim=1),), num_tokens=2)
        with pytest.raises(ValueError, match="smaller chunks"):
            encoded_size(header)


def stored_document(data):
    return pa.ipc.read_schema(pa.py_buffer(data[8:])).metadata[b"reprise"]


def forged(data, document):
    """The chunk with another document in a head whose checksum is right."""
    head_bytes = 16 + struct.unpack_from("<i", data, 12)[0]
    return build_head(document) + data[head_bytes:].tobytes()


def assert_ends_are_plain(header):
    """Head and tail of the encoded chunk are what the plain path gives: built once, with every checksum known."""
    data = encode(header, make_layers(header)).tobytes()
    stored, index = header_from_json(stored_document(data))
    head = build_head(header_to_json(header, index))
    assert stored == header
    assert data.startswith(head)
    assert data.endswith(build_tail(head, index, Payload.of(header).frames))


def recorded(data, reads):
    def read(offset, length):
        reads.append((offset, length))
        return data[offset : offset + length]

    return RangeSource(read=read, num_bytes=len(data))


def read_and_verify(data):
    read_chunk(data).verify()


def assert_never_wrong(damaged, header, layers):
    """Reading gives what was written or CorruptChunk."""
    try:
        reader = read_chunk(damaged)
    except CorruptChunk:
        return
    assert reader.header == header
    for i, (k, v) in enumerate(layers):
        try:
            stored_k, stored_v = reader.layer(i)
        except CorruptChunk:
            continue
        assert np.array_equal(stored_k.view(np.uint8), k.view(np.uint8))
        assert np.array_equal(stored_v.view(np.uint8), v.view(np.uint8))
