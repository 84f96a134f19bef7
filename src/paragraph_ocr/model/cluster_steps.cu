// Greedy reading on a Hopper GPU: all steps of a page in one kernel, a cluster of blocks for each page.
//
// The blocks of a cluster share a page's heads, cells, hidden units and tokens, and hand on what the others need
// from shared memory to shared memory, where a barrier counts the bytes that have come. A step is two such exchanges
// for each sublayer (attention to the text, to the page, feed-forward) and one for the logits. Nothing waits for a
// launch, and a page that has ended makes room for the next.
//
// Compiled at run time, with these defined:
//   WIDTH, HEADS, HIDDEN, LAYERS, TOKENS   the decoder's
//   PRE       1 where norms stand before their sublayers
//   HALF      1 where matrices, keys and values are bfloat16, 0 for float32; all sums are float32
//   CLUSTER   blocks of a cluster: HEADS times a power of two
//   STAGED    1 where weights are copied to shared memory before they are needed; 0 where they do not fit
//   THREADS   of a block

typedef unsigned int Bits;
typedef unsigned long long Wide;

#if HALF
typedef unsigned short Stored;
constexpr int LANES = 8;  // numbers in 16 bytes
#else
typedef float Stored;
constexpr int LANES = 4;
#endif

constexpr int WARPS = THREADS / 32;
constexpr int HEAD = WIDTH / HEADS;
constexpr int PARTS = CLUSTER / HEADS;        // blocks that share a head, each some of its cells
constexpr int SLICE = WIDTH / CLUSTER;        // of the residual stream, that a block adds up
constexpr int UNITS = HIDDEN / CLUSTER;       // hidden units of a block
constexpr int CHOICES = (TOKENS + CLUSTER - 1) / CLUSTER;  // tokens of a block
constexpr int PACKET = SLICE + 4;             // what a block sends another: a slice's update; maximum and sum
constexpr int AT_ONCE = 4;                    // cells whose keys and values are fetched together
constexpr float NOTHING = -1e30f;             // a maximum of no cells; finite, so that differences are numbers
constexpr float LOG2_E = 1.44269504f;         // scores are exponents of 2
constexpr Bits ALL = 0xffffffff;

enum Kind { OWN, CROSS, FEED_FORWARD, READ_OUT };  // attention to the text, to the page; and what follows the layers

constexpr int SUBLAYERS = 3 * LAYERS;
constexpr int INWARD = 4 * WIDTH + HIDDEN;                   // rows of a layer's matrices that see its inputs
constexpr int OUTWARD = 2 * WIDTH * WIDTH + WIDTH * HIDDEN;  // numbers of those that give its updates
constexpr int BIASES = 4 * HEAD + UNITS;                     // a block's of a layer's INWARD

__device__ constexpr int larger(int one, int other) { return one > other ? one : other; }

constexpr int INNER_ROOM = larger(HEAD, larger(UNITS, CHOICES)) * WIDTH;
constexpr int SLOT = INNER_ROOM + WIDTH * larger(HEAD, UNITS);  // numbers staged of a sublayer

// A vector in shared memory has a gap after every 32 numbers, so that eight lanes that read 16 of each 32 bytes
// find them in different banks.
__device__ constexpr int place(int index) { return index + index / 32 * 4; }

// How K numbers are spread over lanes: SPAN lanes hold a row, each CHUNKS times LANES numbers of it.
template <int K> struct Row {
    static constexpr int SPAN = K / LANES < 8 ? K / LANES : 8;
    static constexpr int CHUNKS = K / LANES / SPAN;
    static constexpr int NUMBERS = CHUNKS * LANES;
    static constexpr int GROUPS = THREADS / SPAN;
    static_assert(K == NUMBERS * SPAN && 32 % SPAN == 0, "rows must fill their lanes");
    static __device__ int lane() { return threadIdx.x % SPAN; }
    static __device__ int group() { return threadIdx.x / SPAN; }
};

__device__ void unpack(const uint4& chunk, float (&numbers)[LANES]) {
    const Bits words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
#if HALF
        numbers[2 * word] = __uint_as_float(words[word] << 16);
        numbers[2 * word + 1] = __uint_as_float(words[word] & 0xffff0000);
#else
        numbers[word] = __uint_as_float(words[word]);
#endif
    }
}

__device__ Stored stored(float number) {
#if HALF
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
#else
    return number;
#endif
}

__device__ float power_of_2(float exponent) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
    return power;
}

template <int FROM, int TO> __device__ float summed(float number) {
#pragma unroll
    for (int offset = FROM; offset < TO; offset *= 2) number += __shfl_xor_sync(ALL, number, offset);
    return number;
}

template <int FROM, int TO> __device__ float largest(float number) {
#pragma unroll
    for (int offset = FROM; offset < TO; offset *= 2)
        number = fmaxf(number, __shfl_xor_sync(ALL, number, offset));
    return number;
}

__device__ float dot(const uint4& chunk, const float* inputs, float total) {
    float numbers[LANES];
    unpack(chunk, numbers);
#pragma unroll
    for (int index = 0; index < LANES; ++index) total = fmaf(numbers[index], inputs[index], total);
    return total;
}

// A thread's numbers of a vector of K in shared memory.
template <int K> __device__ void load(const float* vector, float (&numbers)[Row<K>::NUMBERS]) {
#pragma unroll
    for (int index = 0; index < Row<K>::NUMBERS; index += 4) {
        const int chunk = index / LANES * Row<K>::SPAN + Row<K>::lane();
        const float4 four = *(const float4*)(vector + place(chunk * LANES + index % LANES));
        numbers[index] = four.x, numbers[index + 1] = four.y;
        numbers[index + 2] = four.z, numbers[index + 3] = four.w;
    }
}

// The product of a row of K weights and a vector, in all lanes of the group.
template <int K> __device__ float product(const Stored* weights, const float (&numbers)[Row<K>::NUMBERS]) {
    float total = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < Row<K>::CHUNKS; ++chunk) {
        const int column = (chunk * Row<K>::SPAN + Row<K>::lane()) * LANES;
        total = dot(*(const uint4*)(weights + column), numbers + chunk * LANES, total);
    }
    return summed<1, Row<K>::SPAN>(total);
}

// Multiply rows of K weights with a vector; give each row and its product to `take`, in one lane.
template <int K, class Take>
__device__ void each_row(const Stored* weights, int rows, const float* vector, Take take) {
    float numbers[Row<K>::NUMBERS];
    load<K>(vector, numbers);
#pragma unroll 2
    for (int first = 0; first < rows; first += Row<K>::GROUPS) {
        const int row = first + Row<K>::group();
        const float total = product<K>(weights + min(row, rows - 1) * K, numbers);
        if (Row<K>::lane() == 0 && row < rows) take(row, total);
    }
}

// Multiply WIDTH rows of K weights with a vector; give the first of each four rows and their products to `take`.
template <int K, class Take> __device__ void each_four_rows(const Stored* weights, const float* vector, Take take) {
    float numbers[Row<K>::NUMBERS];
    load<K>(vector, numbers);
#pragma unroll 2
    for (int first = 0; first < WIDTH; first += 4 * Row<K>::GROUPS) {
        const int row = first + 4 * Row<K>::group();
        const Stored* from = weights + min(row, WIDTH - 4) * K;
        const float4 products = {product<K>(from, numbers), product<K>(from + K, numbers),
                                 product<K>(from + 2 * K, numbers), product<K>(from + 3 * K, numbers)};
        if (Row<K>::lane() == 0 && row < WIDTH) take(row, products);
    }
}

__device__ Bits in_shared(const void* pointer) { return (Bits)__cvta_generic_to_shared(pointer); }

// A barrier opens when a thread has said how many bytes are to come, and they have come.

__device__ void initialise(Wide* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(in_shared(barrier)) : "memory");
}

__device__ void expect(Wide* barrier, Bits bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(barrier)), "r"(bytes)
                 : "memory");
}

__device__ void wait(Wide* barrier, Bits parity) {
    Bits opened = 0;
    while (!opened)
        asm volatile(
            "{\n .reg .pred opened;\n"
            " mbarrier.try_wait.parity.shared::cta.b64 opened, [%1], %2;\n"
            " selp.u32 %0, 1, 0, opened;\n}"
            : "=r"(opened) : "r"(in_shared(barrier)), "r"(parity) : "memory");
}

__device__ void copy(Stored* to, const Stored* from, int count, Wide* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(in_shared(to)), "l"(from), "r"(count * (int)sizeof(Stored)), "r"(in_shared(barrier))
                 : "memory");
}

// A barrier in each block's shared memory that opens when so many bytes have come from all blocks.
struct Channel {
    Wide* barrier;
    Bits bytes;
    Bits turn = 0;

    __device__ void open() const {
        initialise(barrier);
        expect(barrier, bytes);
    }

    __device__ void send(const float* to, float number, int block) const {
        asm volatile(
            "{\n .reg .u32 there, door;\n"
            " mapa.shared::cluster.u32 there, %0, %2;\n"
            " mapa.shared::cluster.u32 door, %1, %2;\n"
            " st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [door];\n}"
            ::"r"(in_shared(to)), "r"(in_shared(barrier)), "r"(block), "r"(__float_as_uint(number)) : "memory");
    }

    __device__ void send(const float* to, float4 four, int block) const {
        asm volatile(
            "{\n .reg .u32 there, door;\n"
            " mapa.shared::cluster.u32 there, %0, %2;\n"
            " mapa.shared::cluster.u32 door, %1, %2;\n"
            " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3, %4, %5, %6}, [door];\n}"
            ::"r"(in_shared(to)), "r"(in_shared(barrier)), "r"(block), "r"(__float_as_uint(four.x)),
            "r"(__float_as_uint(four.y)), "r"(__float_as_uint(four.z)), "r"(__float_as_uint(four.w)) : "memory");
    }

    // Which of two buffers the bytes of this turn are in.
    __device__ int side() const { return turn & 1; }

    __device__ void await() {
        wait(barrier, turn & 1);
        if (threadIdx.x == 0) expect(barrier, bytes);
        ++turn;
    }
};

__device__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

struct Shared {
    alignas(16) float states[2][WIDTH];             // the residual stream
    alignas(16) float packets[2][CLUSTER][PACKET];  // parts of its next update
    alignas(16) float inputs[place(WIDTH)];         // the stream as a sublayer sees it
    alignas(16) float query[place(HEAD)];
    alignas(16) float found[place(HEAD)];           // what the head has gathered of its cells
    alignas(16) float hidden[place(UNITS)];
    float logits[2][TOKENS];
    float biases[LAYERS * BIASES + CHOICES];
    float shifts[SUBLAYERS][SLICE], norms[SUBLAYERS][2][SLICE];
    float gathered[WARPS][HEAD];
    float most[WARPS], total[WARPS];
    Wide barriers[3], arrivals[2];
};

struct Block {
    Shared& shared;
    int rank;  // in the cluster
    Channel updates, streams, choices;
    float mean, scale;  // of the stream as it was last normalised

    __device__ float* stream() { return shared.states[streams.side()]; }

    // Put the residual stream, of mean 0 and variance 1, into `inputs`.
    __device__ void normalise(bool really, float epsilon) {
        mean = 0.0f, scale = 1.0f;
        if (really) {
            float sum = 0.0f, squares = 0.0f;
#pragma unroll
            for (int column = threadIdx.x % 32; column < WIDTH; column += 32) {
                const float number = stream()[column];
                sum += number, squares = fmaf(number, number, squares);
            }
            mean = summed<1, 32>(sum) / WIDTH;
            squares = summed<1, 32>(squares) / WIDTH;
            scale = rsqrtf(fmaxf(squares - mean * mean, 0.0f) + epsilon);
        }
        for (int column = threadIdx.x; column < WIDTH; column += THREADS)
            shared.inputs[place(column)] = (stream()[column] - mean) * scale;
        __syncthreads();
    }

    // Put what the query gathers of `count` cells into `found`, not yet divided by the sum that is sent with it.
    // Values lie `values` numbers behind keys, cells `stride` apart.
    __device__ void attend(const Stored* keys, long long values, int stride, int count, const unsigned char* mask) {
        using Cell = Row<HEAD>;
        float query[Cell::NUMBERS], gathered[Cell::NUMBERS] = {};
        load<HEAD>(shared.query, query);
        float most = NOTHING, total = 0.0f;
        for (int first = 0; first < count; first += AT_ONCE * Cell::GROUPS) {
            uint4 key[AT_ONCE][Cell::CHUNKS], value[AT_ONCE][Cell::CHUNKS];
            bool seen[AT_ONCE];
#pragma unroll
            for (int one = 0; one < AT_ONCE; ++one) {
                const int cell = first + one * Cell::GROUPS + Cell::group();
                seen[one] = cell < count && (!mask || mask[cell * PARTS]);
#pragma unroll
                for (int chunk = 0; chunk < Cell::CHUNKS; ++chunk) {
                    const int from = cell * stride + (chunk * Cell::SPAN + Cell::lane()) * LANES;
                    key[one][chunk] = seen[one] ? *(const uint4*)(keys + from) : uint4();
                    value[one][chunk] = seen[one] ? *(const uint4*)(keys + values + from) : uint4();
                }
            }
            float scores[AT_ONCE], highest = most;
#pragma unroll
            for (int one = 0; one < AT_ONCE; ++one) {
                float score = 0.0f;
#pragma unroll
                for (int chunk = 0; chunk < Cell::CHUNKS; ++chunk)
                    score = dot(key[one][chunk], query + chunk * LANES, score);
                score = summed<1, Cell::SPAN>(score);
                scores[one] = seen[one] ? score : NOTHING;
                highest = fmaxf(highest, scores[one]);
            }
            const float shrink = power_of_2(most - highest);
            most = highest, total *= shrink;
#pragma unroll
            for (int index = 0; index < Cell::NUMBERS; ++index) gathered[index] *= shrink;
#pragma unroll
            for (int one = 0; one < AT_ONCE; ++one) {
                const float weight = seen[one] ? power_of_2(scores[one] - highest) : 0.0f;
                total += weight;
#pragma unroll
                for (int chunk = 0; chunk < Cell::CHUNKS; ++chunk) {
                    float numbers[LANES];
                    unpack(value[one][chunk], numbers);
#pragma unroll
                    for (int index = 0; index < LANES; ++index)
                        gathered[chunk * LANES + index] =
                            fmaf(weight, numbers[index], gathered[chunk * LANES + index]);
                }
            }
        }
        // groups of the warp, then warps
        const float highest = largest<Cell::SPAN, 32>(most), shrink = power_of_2(most - highest);
        total = summed<Cell::SPAN, 32>(total * shrink);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int index = 0; index < Cell::NUMBERS; ++index) {
            gathered[index] = summed<Cell::SPAN, 32>(gathered[index] * shrink);
            const int chunk = index / LANES * Cell::SPAN + Cell::lane();
            if (lane < Cell::SPAN) shared.gathered[warp][chunk * LANES + index % LANES] = gathered[index];
        }
        if (lane == 0) shared.most[warp] = highest, shared.total[warp] = total;
        __syncthreads();
        if (warp * 32 < HEAD) {
            const float its = shared.most[lane % WARPS];
            const float top = largest<1, WARPS>(its), factor = power_of_2(its - top);
            const float all = summed<1, WARPS>(factor * shared.total[lane % WARPS]);
            float sum = 0.0f;
#pragma unroll
            for (int other = 0; other < WARPS; ++other) {
                const float share = __shfl_sync(ALL, factor, other);
                if (threadIdx.x < HEAD) sum = fmaf(share, shared.gathered[other][threadIdx.x], sum);
            }
            if (threadIdx.x < HEAD) shared.found[place(threadIdx.x)] = sum;
            if (warp == 0) announce(top, all);
        }
        __syncthreads();
    }

    // Send all blocks the maximum and the sum by which this block's update is weighed.
    __device__ void announce(float most, float total) {
        float(*packets)[PACKET] = shared.packets[updates.side()];
        if (threadIdx.x < CLUSTER)
            updates.send(&packets[rank][SLICE], make_float4(most, total, 0.0f, 0.0f), threadIdx.x);
    }

    // Send each block its slice of the update that comes of a vector.
    template <int K> __device__ void contribute(const Stored* weights, const float* vector) {
        float(*packets)[PACKET] = shared.packets[updates.side()];
        each_four_rows<K>(weights, vector, [&](int row, float4 products) {
            updates.send(&packets[rank][row % SLICE], products, row / SLICE);
        });
    }

    // Add up this block's slice, send it to all, and wait for theirs: the stream behind the sublayer. Where norms
    // stand behind sublayers, the update is added to what the last one has returned (`normalised`).
    __device__ void advance(int sublayer, bool normalised) {
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x, column = rank * SLICE + lane;
            float sum = 0.0f;
            if (lane < SLICE) {
                sum = stream()[column];
                const float(&norm)[2][SLICE] = shared.norms[sublayer];
                if (normalised) sum = fmaf((sum - mean) * scale, norm[0][lane], norm[1][lane]);
                sum += shared.shifts[sublayer][lane];
            }
            const float(*packets)[PACKET] = shared.packets[updates.side()];
            updates.await();  // the other warps need not
            const float its = lane < CLUSTER ? packets[lane][SLICE] : NOTHING;
            const float factor = power_of_2(its - largest<1, PARTS>(its));
            const float total = lane < CLUSTER ? factor * packets[lane][SLICE + 1] : 1.0f;
            const float weight = factor / summed<1, PARTS>(total);
#pragma unroll
            for (int block = 0; block < CLUSTER; ++block) {
                const float share = __shfl_sync(ALL, weight, block);
                if (lane < SLICE) sum = fmaf(share, packets[block][lane], sum);
            }
            constexpr int QUADS = SLICE / 4, AT_A_TIME = 32 / QUADS;
            const int first = lane % QUADS * 4;
            const float4 four = {__shfl_sync(ALL, sum, first), __shfl_sync(ALL, sum, first + 1),
                                 __shfl_sync(ALL, sum, first + 2), __shfl_sync(ALL, sum, first + 3)};
            float* next = shared.states[streams.side() ^ 1] + rank * SLICE + first;
            if (lane < QUADS * AT_A_TIME)
                for (int block = lane / QUADS; block < CLUSTER; block += AT_A_TIME) streams.send(next, four, block);
        } else {
            ++updates.turn;
        }
        streams.await();
    }
};

// A sublayer's weights, as one block of the cluster needs them; SUBLAYERS stands for the read-out.
struct Sublayer {
    int index, rank;

    __device__ Kind kind() const { return index == SUBLAYERS ? READ_OUT : Kind(index % 3); }

    // Rows of the matrix that sees the inputs: to queries, hidden units, logits. Those to keys and values follow.
    __device__ int rows() const {
        if (kind() == READ_OUT) return min(CHOICES, max(0, TOKENS - rank * CHOICES));
        return kind() == FEED_FORWARD ? UNITS : HEAD;
    }

    __device__ int first_row() const {
        const int before = index / 3 * INWARD, head = rank / PARTS;
        if (kind() == READ_OUT) return before + rank * CHOICES;
        if (kind() == FEED_FORWARD) return before + 4 * WIDTH + rank * UNITS;
        return kind() == OWN ? before + head * 3 * HEAD : before + 3 * WIDTH + head * HEAD;
    }

    // Where the biases of these rows are among the block's.
    __device__ int first_bias() const { return index / 3 * BIASES + (index % 3 ? (index % 3 + 2) * HEAD : 0); }

    // Columns of the matrix that gives the update.
    __device__ int columns() const { return kind() == READ_OUT ? 0 : kind() == FEED_FORWARD ? UNITS : HEAD; }

    __device__ int first_outward() const {
        const int share = kind() == FEED_FORWARD ? rank : rank / PARTS;
        return index / 3 * OUTWARD + index % 3 * WIDTH * WIDTH + share * columns() * WIDTH;
    }
};

// Write the likeliest token of each step of each page, up to its end, and its log-probability.
//
//   inward     LAYERS times INWARD, and TOKENS, rows of WIDTH: to queries, keys and values of the text, a head's
//              after another's; to queries of the page; to hidden units; to logits. With the norms' gains in them
//   biases     of these rows
//   outward    LAYERS times HEADS WIDTH HEAD, HEADS WIDTH HEAD, CLUSTER WIDTH UNITS
//   shifts     SUBLAYERS WIDTH: the biases of these
//   norms      SUBLAYERS 2 WIDTH: gain and shift of the norm before each
//   embedding  TOKENS WIDTH, positions  steps WIDTH
//   memory     pages LAYERS 2 HEADS cells HEAD: keys and values
//   mask       pages cells: 1 where a cell is seen; null if all are
//   past       clusters CLUSTER LAYERS 2 ceil(steps / PARTS) HEAD
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
read_pages(const Stored* __restrict__ inward, const float* __restrict__ biases, const Stored* __restrict__ outward,
           const float* __restrict__ shifts, const float* __restrict__ norms, const float* __restrict__ embedding,
           const float* __restrict__ positions, const Stored* memory, const unsigned char* __restrict__ mask,
           Stored* past, long long* written, float* scores, float epsilon, int pages, int cells,
           int steps, int start, int end) {
    __shared__ __align__(16) Shared shared;
    const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER, rank = blockIdx.x % CLUSTER;
    const int lane = threadIdx.x % 32;
    const int head = rank / PARTS, part = rank % PARTS, places = (steps + PARTS - 1) / PARTS;
    past += (long long)blockIdx.x * LAYERS * 2 * places * HEAD;

    Block block{shared, rank,
                {&shared.barriers[0], CLUSTER * PACKET * 4}, {&shared.barriers[1], WIDTH * 4},
                {&shared.barriers[2], TOKENS * 4}};
    if (threadIdx.x == 0) {
        block.updates.open(), block.streams.open(), block.choices.open();
        initialise(&shared.arrivals[0]), initialise(&shared.arrivals[1]);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int index = 0; index <= SUBLAYERS; ++index) {
        const Sublayer sublayer{index, rank};
        const int rows = sublayer.kind() == OWN ? 3 * HEAD : sublayer.rows();
        for (int row = threadIdx.x; row < rows; row += THREADS)
            shared.biases[sublayer.first_bias() + row] = biases[sublayer.first_row() + row];
        if (index < SUBLAYERS && threadIdx.x < SLICE) {
            const int column = rank * SLICE + threadIdx.x;
            shared.shifts[index][threadIdx.x] = shifts[index * WIDTH + column];
            for (int one = 0; one < 2; ++one)
                shared.norms[index][one][threadIdx.x] = norms[(2 * index + one) * WIDTH + column];
        }
    }
    meet_cluster();

    // One of the head's blocks keeps a token's key and value.
    const auto keeps = [&](Bits taken) { return taken % PARTS == part; };

#if STAGED
    extern __shared__ __align__(16) Stored stage[];  // two slots, and room for a projection to keys and values
    const auto slot = [&](Bits turn) { return stage + turn % 2 * SLOT; };
    // Have the weights of the sublayer of some turn brought to its slot, where those of two turns before were.
    const auto bring = [&](Sublayer sublayer, Bits turn, Bits taken) {
        if (threadIdx.x != THREADS - 32) return;  // a warp that has less to do than the first
        const bool keeping = sublayer.kind() == OWN && keeps(taken);
        const int inner = sublayer.rows() * WIDTH, outer = WIDTH * sublayer.columns();
        Wide* arrival = &shared.arrivals[turn % 2];
        expect(arrival, (inner + outer + (keeping ? 2 * HEAD * WIDTH : 0)) * sizeof(Stored));
        const Stored* from = inward + sublayer.first_row() * WIDTH;
        if (inner) copy(slot(turn), from, inner, arrival);
        if (outer) copy(slot(turn) + INNER_ROOM, outward + sublayer.first_outward(), outer, arrival);
        if (keeping) copy(stage + 2 * SLOT, from + inner, 2 * HEAD * WIDTH, arrival);
    };
    bring({0, rank}, 0, 0);
#endif

    Bits turn = 0;   // sublayers and read-outs so far
    Bits taken = 0;  // steps, of all pages
    for (int page = cluster; page < pages; page += clusters) {
        const unsigned char* seen = mask ? mask + (long long)page * cells + part : nullptr;
        const Stored* page_cells = memory + (((long long)page * LAYERS * 2 * HEADS + head) * cells + part) * HEAD;
        const int offset = (part + PARTS - taken % PARTS) % PARTS;  // it keeps every PARTS'th cell of the text from here
        int token = start;
        for (int step = 0; step < steps && (step == 0 || token != end); ++step) {  // start may be end
            for (int column = threadIdx.x; column < WIDTH; column += THREADS)
                block.stream()[column] = embedding[token * WIDTH + column] + positions[step * WIDTH + column];
            __syncthreads();
            for (int index = 0; index < SUBLAYERS; ++index, ++turn) {
                const Sublayer sublayer{index, rank};
                const Kind kind = sublayer.kind();
                const float* bias = shared.biases + sublayer.first_bias();
                block.normalise(PRE || index > 0, epsilon);
#if STAGED
                bring({index + 1, rank}, turn + 1, taken);
                wait(&shared.arrivals[turn % 2], turn / 2 % 2);
                const Stored *inner = slot(turn), *to_cell = stage + 2 * SLOT, *outer = inner + INNER_ROOM;
#else
                const Stored* inner = inward + sublayer.first_row() * WIDTH;
                const Stored *to_cell = inner + HEAD * WIDTH, *outer = outward + sublayer.first_outward();
#endif
                each_row<WIDTH>(inner, sublayer.rows(), shared.inputs, [&](int row, float product) {
                    product += bias[row];
                    if (kind == FEED_FORWARD) shared.hidden[place(row)] = fmaxf(product, 0.0f);
                    else shared.query[place(row)] = product * (LOG2_E / sqrtf((float)HEAD));
                });
                Stored* own = past + index / 3 * 2 * places * HEAD;
                if (kind == OWN && keeps(taken))
                    each_row<WIDTH>(to_cell, 2 * HEAD, shared.inputs, [&](int row, float product) {
                        const int from = row / HEAD * places + step / PARTS;
                        own[from * HEAD + row % HEAD] = stored(product + bias[HEAD + row]);
                    });
                __syncthreads();
                if (kind == FEED_FORWARD) {
                    if (threadIdx.x < 32) block.announce(0.0f, 1.0f / PARTS);  // all count alike
                    block.contribute<UNITS>(outer, shared.hidden);
                } else {
                    const bool text = kind == OWN;
                    const Stored* cross = page_cells + (long long)index / 3 * 2 * WIDTH * cells;
                    const int count = text ? (step - offset + PARTS) / PARTS : (cells - part + PARTS - 1) / PARTS;
                    block.attend(text ? own : cross, text ? places * HEAD : WIDTH * cells, text ? HEAD : PARTS * HEAD,
                                 count, text ? nullptr : seen);
                    block.contribute<HEAD>(outer, shared.found);
                }
                block.advance(index, !PRE && index > 0);
            }

            const Sublayer read_out{SUBLAYERS, rank};
            block.normalise(true, epsilon);
#if STAGED
            bring({0, rank}, turn + 1, taken + 1);
            wait(&shared.arrivals[turn % 2], turn / 2 % 2);
            const Stored* inner = slot(turn);
#else
            const Stored* inner = inward + read_out.first_row() * WIDTH;
#endif
            ++turn, ++taken;
            float* logits = shared.logits[block.choices.side()];
            each_row<WIDTH>(inner, read_out.rows(), shared.inputs, [&](int row, float product) {
                product += shared.biases[read_out.first_bias() + row];
                for (int other = 0; other < CLUSTER; ++other)
                    block.choices.send(logits + rank * CHOICES + row, product, other);
            });
            block.choices.await();

            float best = NOTHING;
            token = 0;
            for (int other = lane; other < TOKENS; other += 32)
                if (logits[other] > best) best = logits[other], token = other;
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                const float its = __shfl_xor_sync(ALL, best, offset);
                const int there = __shfl_xor_sync(ALL, token, offset);
                if (its > best || (its == best && there < token)) best = its, token = there;
            }
            if (rank == 0 && threadIdx.x < 32) {
                float sum = 0.0f;
                for (int other = lane; other < TOKENS; other += 32) sum += expf(logits[other] - best);
                sum = summed<1, 32>(sum);
                if (lane == 0) {
                    written[(long long)page * steps + step] = token;
                    scores[(long long)page * steps + step] = -logf(sum);
                }
            }
        }
    }
#if STAGED
    wait(&shared.arrivals[turn % 2], turn / 2 % 2);  // for what was brought in vain
#endif
    meet_cluster();  // no block goes while another may still send to it
}
