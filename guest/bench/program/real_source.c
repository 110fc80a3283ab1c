/* What cc1 and as are given: several copies of this text, `@` replaced by the number of the copy. No headers. */
typedef unsigned long size_t@;
typedef unsigned char byte@;
extern void *malloc(unsigned long);
extern void free(void *);
extern int printf(const char *, ...);

struct item@ { struct item@ *next; const char *name; unsigned hash; int count; double weight; };
struct table@ { struct item@ **slots; size_t@ size, used; };
enum kind@ { END@, NUMBER@, PLUS@, MINUS@, TIMES@, OVER@, OPEN@, CLOSE@, BAD@ };
struct lexer@ { const char *at; enum kind@ kind; long value; int errors; };

static unsigned hash_@(const char *text) {
    unsigned hash = 2166136261u + @;
    while (*text) {
        hash ^= (byte@)*text++;
        hash *= 16777619u;
    }
    return hash;
}

static int same_@(const char *a, const char *b) {
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

static int grow_@(struct table@ *table) {
    size_t@ size = table->size ? table->size * 2 : 16;
    struct item@ **slots = malloc(size * sizeof *slots);
    if (!slots) return -1;
    for (size_t@ i = 0; i < size; i++) slots[i] = 0;
    for (size_t@ i = 0; i < table->size; i++) {
        struct item@ *item = table->slots[i];
        while (item) {
            struct item@ *next = item->next;
            size_t@ place = item->hash & (size - 1);
            item->next = slots[place];
            slots[place] = item;
            item = next;
        }
    }
    free(table->slots);
    table->slots = slots;
    table->size = size;
    return 0;
}

struct item@ *enter_@(struct table@ *table, const char *name, int add) {
    unsigned hash = hash_@(name);
    if (table->size) {
        struct item@ *item = table->slots[hash & (table->size - 1)];
        for (; item; item = item->next)
            if (item->hash == hash && same_@(item->name, name)) {
                item->count += add;
                item->weight = item->weight * 0.75 + add / 4.0;
                return item;
            }
    }
    if (table->used >= table->size / 4 * 3 && grow_@(table)) return 0;
    struct item@ *item = malloc(sizeof *item);
    if (!item) return 0;
    *item = (struct item@){ table->slots[hash & (table->size - 1)], name, hash, add, add };
    table->slots[hash & (table->size - 1)] = item;
    table->used++;
    return item;
}

static void advance_@(struct lexer@ *lexer) {
    while (*lexer->at == ' ' || *lexer->at == '\t' || *lexer->at == '\n') lexer->at++;
    char c = *lexer->at;
    if (c >= '0' && c <= '9') {
        long value = 0;
        while ((c = *lexer->at) >= '0' && c <= '9') value = value * 10 + (c - '0'), lexer->at++;
        lexer->value = value;
        lexer->kind = NUMBER@;
        return;
    }
    if (c) lexer->at++;
    switch (c) {
    case 0: lexer->kind = END@; break;
    case '+': lexer->kind = PLUS@; break;
    case '-': lexer->kind = MINUS@; break;
    case '*': lexer->kind = TIMES@; break;
    case '/': lexer->kind = OVER@; break;
    case '(': lexer->kind = OPEN@; break;
    case ')': lexer->kind = CLOSE@; break;
    default: lexer->kind = BAD@; lexer->errors++; break;
    }
}

static long sum_@(struct lexer@ *lexer);

static long factor_@(struct lexer@ *lexer) {
    long value = 0;
    switch (lexer->kind) {
    case NUMBER@: value = lexer->value; advance_@(lexer); break;
    case MINUS@: advance_@(lexer); value = -factor_@(lexer); break;
    case OPEN@:
        advance_@(lexer);
        value = sum_@(lexer);
        if (lexer->kind == CLOSE@) advance_@(lexer);
        else lexer->errors++;
        break;
    default: lexer->errors++; advance_@(lexer); break;
    }
    return value;
}

static long product_@(struct lexer@ *lexer) {
    long value = factor_@(lexer);
    while (lexer->kind == TIMES@ || lexer->kind == OVER@) {
        enum kind@ kind = lexer->kind;
        advance_@(lexer);
        long other = factor_@(lexer);
        if (kind == TIMES@) value *= other;
        else if (other) value /= other;
        else lexer->errors++;
    }
    return value;
}

static long sum_@(struct lexer@ *lexer) {
    long value = product_@(lexer);
    while (lexer->kind == PLUS@ || lexer->kind == MINUS@) {
        int sign = lexer->kind == PLUS@ ? 1 : -1;
        advance_@(lexer);
        value += sign * product_@(lexer);
    }
    return value;
}

long evaluate_@(const char *text, int *errors) {
    struct lexer@ lexer = { text, END@, 0, 0 };
    advance_@(&lexer);
    long value = sum_@(&lexer);
    if (lexer.kind != END@) lexer.errors++;
    *errors = lexer.errors;
    return value;
}

void multiply_@(double *restrict c, const double *restrict a, const double *restrict b, int n) {
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int k = 0; k < n; k++) sum += a[i * n + k] * b[k * n + j];
            c[i * n + j] = sum * (1.0 + @ * 1e-6);
        }
}

void sort_@(int *first, int *last) {
    while (last - first > 8) {
        int pivot = first[(last - first) / 2], *low = first, *high = last - 1;
        for (;;) {
            while (*low < pivot) low++;
            while (pivot < *high) high--;
            if (low >= high) break;
            int other = *low;
            *low++ = *high;
            *high-- = other;
        }
        sort_@(first, low);
        first = low;
    }
    for (int *at = first + 1; at < last; at++) {
        int value = *at, *hole = at;
        while (hole > first && hole[-1] > value) *hole = hole[-1], hole--;
        *hole = value;
    }
}

unsigned checksum_@(const byte@ *data, size_t@ len) {
    unsigned a = 1, b = 0, bits = 0;
    for (size_t@ i = 0; i < len; i++) {
        a = (a + data[i]) % 65521;
        b = (b + a) % 65521;
        bits += __builtin_popcount(data[i] ^ (a & 0xff));
    }
    return (b << 16 | a) ^ bits * 2654435761u;
}

int report_@(const struct table@ *table, int verbose) {
    int total = 0;
    for (size_t@ i = 0; i < table->size; i++)
        for (const struct item@ *item = table->slots[i]; item; item = item->next) {
            total += item->count;
            if (verbose) printf("%s: %d (%g) in table %d\n", item->name, item->count, item->weight, @);
        }
    return total;
}
