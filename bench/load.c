/* load: clients that load a TCP router, and the server behind it.

       load MODE ------ router, which is measured ------ load backend
                                                   or -- load access tcp, instead of cloudflared

   load backend ADDRESS PORT
   load access tcp --hostname NAME --url ADDRESS:PORT ...     the same server; all but --url is ignored

   A connection to it begins with one TLS record (a ClientHello), and then says what it wants:

       R           one byte back
       E           everything back, from now on
       D, count    that many bytes back; the count has 64 bits, the highest first
       U, count    that many bytes follow, then one byte back

   load MODE ADDRESS PORT HELLOS [--clients N] [--seconds S] [--size BYTES] [--every MS]

       connect     connect, have one byte back, close; and again
       down, up    connect, move SIZE bytes, close; and again
       ping        open a connection, then send SIZE bytes and have them back; and again, at once or every MS
       hold        open a connection, and no more
       stand       only connect, and say nothing

   HELLOS is a file of TLS records, taken in turn.  The line `ready` says that the clock runs: at once, or when
   all connections of ping, hold and stand are open, or have failed.  After S seconds, or when standard input
   ends, nothing new is begun, and what is under way is waited for: with 0 seconds each client does its work
   once.  The last line is

       n=... failures=... seconds=... rate=... p50_us=... p90_us=... p99_us=... max_us=... mb_s=...
*/

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#ifndef TUNNEL_CORE
#define TUNNEL_CORE 1 /* a tunnel program inherits the router's core, and would be measured with it */
#endif

enum {
    RECORD_HEADER = 5,
    RECORD_MAX = RECORD_HEADER + 0xffff,
    RANDOM_AT = 11,  /* of a ClientHello, in its record: RFC 8446 4.1.2 */
    BACKLOG = 4096,  /* the kernel caps it at somaxconn */
    EVENTS = 256,    /* taken in one go */
    BULK = 1 << 18,  /* bytes moved in one go */
    OPENING = 128,   /* connections that are opened at a time: a crowd is not to overflow a backlog */
    SOURCES = 16,    /* addresses from 127.0.0.2 on: each has ephemeral ports of its own */
    PATIENCE = 30,   /* seconds in which nothing happens: then it never will */
};
static const char ANSWER = 'k';

static char bulk[BULK];
static int poller;

static void fail(const char *what)
{
    perror(what);
    exit(2);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static size_t at_most(uint64_t wanted, size_t limit)
{
    return wanted < limit ? wanted : limit;
}

/* Wait for these events of a descriptor; `watched` is what it waits for now, 0 where it is new. */
static void watch(int fd, void *owner, uint32_t *watched, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = owner};
    if (events != *watched && epoll_ctl(poller, *watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event))
        fail("epoll_ctl");
    *watched = events;
}

static struct sockaddr_in address_of(const char *host, const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        fail(host);
    return address;
}

static int new_socket(void)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int)))
        fail("socket");
    return fd;
}

/* -- the server ---------------------------------------------------------------------------------- */

struct peer {
    int fd;
    uint32_t watched;
    enum { HEADER, HELLO, COMMAND, COUNT, ECHO, SEND, TAKE, DONE } phase;
    char command;
    int digits;      /* bytes of `number` that have come, in HEADER and COUNT */
    uint64_t number;
    uint64_t left;   /* bytes of HELLO and TAKE that are to come, or of SEND that are to go */
    char *unsent;    /* of an echo or answer that did not fit; nothing is read meanwhile */
    size_t unsent_size;
};

/* Send, and keep what does not fit.  False: the connection is over. */
static bool say(struct peer *peer, const char *data, size_t size)
{
    ssize_t sent = send(peer->fd, data, size, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN)
        return false;
    char *rest = NULL;
    if ((peer->unsent_size = size - (sent > 0 ? sent : 0))) {
        if (!(rest = malloc(peer->unsent_size)))
            fail("malloc");
        memcpy(rest, data + size - peer->unsent_size, peer->unsent_size);
    }
    free(peer->unsent); /* only now: `data` may be in it */
    peer->unsent = rest;
    return true;
}

/* One byte of a number.  True: that was the last. */
static bool add_digit(struct peer *peer, char byte, int size)
{
    peer->number = peer->number << 8 | (unsigned char)byte;
    return ++peer->digits == size;
}

/* Do what these bytes say.  False: the connection is over. */
static bool obey(struct peer *peer, const char *data, size_t size)
{
    for (size_t used; size; data += used, size -= used) {
        used = 1;
        switch (peer->phase) {
        case HEADER:
            if (add_digit(peer, *data, RECORD_HEADER)) {
                peer->left = peer->number & 0xffff;
                peer->number = peer->digits = 0;
                peer->phase = HELLO;
            }
            break;
        case HELLO:
            used = at_most(peer->left, size);
            if (!(peer->left -= used))
                peer->phase = COMMAND;
            break;
        case COMMAND:
            peer->command = *data;
            peer->phase = *data == 'E' ? ECHO : *data == 'R' ? DONE : COUNT;
            if (*data == 'R' && !say(peer, &ANSWER, 1))
                return false;
            break;
        case COUNT:
            if (add_digit(peer, *data, sizeof peer->number)) {
                peer->left = peer->number;
                peer->phase = peer->command == 'D' ? SEND : TAKE;
            }
            break;
        case TAKE:
            used = at_most(peer->left, size);
            if (!(peer->left -= used)) {
                peer->phase = DONE;
                if (!say(peer, &ANSWER, 1))
                    return false;
            }
            break;
        case ECHO:
            return say(peer, data, size);
        case SEND:
        case DONE:
            return true; /* nobody asked for that */
        }
    }
    return true;
}

/* Move what can be moved now, once, so that all have their turn.  False: the connection is over. */
static bool attend(struct peer *peer)
{
    if (peer->unsent)
        return say(peer, peer->unsent, peer->unsent_size);
    if (peer->phase == SEND) {
        ssize_t sent = send(peer->fd, bulk, at_most(peer->left, BULK), MSG_NOSIGNAL);
        if (sent > 0 && !(peer->left -= sent))
            peer->phase = DONE;
        return sent > 0 || errno == EAGAIN;
    }
    /* MSG_TRUNC drops bytes without a copy (tcp(7)): the end of an upload is not to be what limits it. */
    ssize_t count = recv(peer->fd, bulk, BULK, peer->phase == TAKE ? MSG_TRUNC : 0);
    return count > 0 ? obey(peer, bulk, count) : count < 0 && errno == EAGAIN;
}

static struct peer *accept_peer(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC); /* inherits TCP_NODELAY */
    if (fd < 0)
        return NULL;
    struct peer *peer = calloc(1, sizeof *peer);
    if (!peer)
        fail("calloc");
    peer->fd = fd;
    return peer;
}

static void serve(struct sockaddr_in address)
{
    int listener = new_socket();
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, BACKLOG))
        fail("listen");
    watch(listener, NULL, &(uint32_t){0}, EPOLLIN);
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(poller, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            struct peer *peer = events[i].data.ptr;
            if (!peer && !(peer = accept_peer(listener)))
                continue;
            if (attend(peer)) {
                watch(peer->fd, peer, &peer->watched, peer->unsent || peer->phase == SEND ? EPOLLOUT : EPOLLIN);
            } else {
                close(peer->fd);
                free(peer->unsent);
                free(peer);
            }
        }
    }
}

/* -- the clients --------------------------------------------------------------------------------- */

static enum { CONNECT, DOWN, UP, PING, HOLD, STAND } mode; /* the first three have a connection for each turn */
static const char *const MODES[] = {"connect", "down", "up", "ping", "hold", "stand"};

struct client {
    int fd;
    uint32_t watched;
    enum { RESTING, CONNECTING, SENDING, WAITING, GONE } state;
    uint64_t left;      /* bytes to be sent, or to come */
    double began, due;  /* its turn, and its next message */
};

static struct sockaddr_in router;
static char *hellos;
static size_t hellos_size, hello_at; /* of the next one */
static uint64_t connects;

static struct client *clients;
static size_t clients_count = 1, started, working;
static uint64_t size = 64;
static double seconds = 1, every, clock_start, clock_end;
static bool ticking, told_to_end;

static double *times, bytes; /* of each turn, and of all */
static size_t times_count, times_room, failures;

static bool is_over(void)
{
    return told_to_end || (ticking && now() >= clock_end);
}

/* The next hello, with a random field that no other has, and what is wanted.  Its size. */
static size_t make_request(char *request)
{
    const unsigned char *record = (unsigned char *)hellos + hello_at;
    size_t length = RECORD_HEADER + (record[3] << 8 | record[4]);
    memcpy(request, record, length);
    memcpy(request + RANDOM_AT, &connects, sizeof connects);
    hello_at = (hello_at + length) % hellos_size;
    request[length++] = mode == CONNECT ? 'R' : mode == DOWN ? 'D' : mode == UP ? 'U' : 'E';
    if (mode == DOWN || mode == UP) {
        memcpy(request + length, &(uint64_t){htobe64(size)}, sizeof size);
        length += sizeof size;
    } else if (mode != CONNECT) {
        request[length++] = ANSWER; /* comes back, and says that the connection is open */
    }
    return length;
}

static void begin(struct client *client)
{
    struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000002 + connects++ % SOURCES)};
    client->fd = new_socket();
    client->watched = 0;
    client->state = CONNECTING;
    client->began = now();
    /* The port is chosen when the other end is known, so that all of them serve once for each router. */
    setsockopt(client->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &(int){1}, sizeof(int));
    if (bind(client->fd, (struct sockaddr *)&source, sizeof source))
        fail("bind");
    if (connect(client->fd, (struct sockaddr *)&router, sizeof router) && errno != EINPROGRESS)
        fail("connect");
    watch(client->fd, client, &client->watched, EPOLLOUT);
    working++;
}

/* Send a message, or as much of an upload as fits.  False: the connection is over. */
static bool push(struct client *client)
{
    ssize_t sent = send(client->fd, bulk, at_most(client->left, BULK), MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN)
        return false;
    if (sent > 0 && !(client->left -= sent)) {
        client->state = WAITING;
        client->left = mode == UP ? 1 : size;
        bytes += size;
    }
    watch(client->fd, client, &client->watched, client->state == SENDING ? EPOLLOUT : EPOLLIN);
    return true;
}

static void settle(struct client *client, bool is_answered);

/* One more message.  Its clock runs from when it was due, though the one before may have been late. */
static void ping(struct client *client)
{
    client->state = SENDING;
    client->left = size;
    client->began = every ? client->due : now();
    client->due += every;
    working++;
    if (!push(client))
        settle(client, false);
}

static void ping_if_due(struct client *client)
{
    if (mode == PING && client->state == RESTING && client->due <= now() && !is_over())
        ping(client);
}

static void start_clock(void)
{
    clock_start = now();
    clock_end = clock_start + seconds;
    ticking = true;
    printf("ready\n");
    fflush(stdout);
    for (size_t i = 0; i < started; i++) {
        clients[i].due = clock_start + i * every / clients_count; /* spread out; without a pace, now */
        ping_if_due(&clients[i]);
    }
}

static void record(double time)
{
    if (times_count == times_room) {
        times_room = times_room ? 2 * times_room : 1 << 16;
        if (!(times = realloc(times, times_room * sizeof *times)))
            fail("realloc");
    }
    times[times_count++] = time;
}

/* A turn has ended, or a connection that rested; go on. */
static void settle(struct client *client, bool is_answered)
{
    bool rested = client->state == RESTING, opened = !ticking;
    client->state = is_answered ? RESTING : GONE;
    failures += !is_answered;
    if (is_answered && ticking)
        record(now() - client->began);
    if (!is_answered || mode <= UP)
        close(client->fd);
    if (rested)
        return;
    working--;
    if (opened && started < clients_count)
        begin(&clients[started++]);
    else if (opened && !working)
        start_clock();
    else if (mode <= UP && !is_over())
        begin(client);
    else if (!opened)
        ping_if_due(client);
}

/* The connect has an answer.  False: it failed. */
static bool introduce(struct client *client)
{
    static char request[RECORD_MAX + 16];
    size_t length = mode == STAND ? 0 : make_request(request);
    if (send(client->fd, request, length, MSG_NOSIGNAL) != (ssize_t)length) /* of nothing: tells the error, too */
        return false;
    client->state = mode == UP ? SENDING : WAITING;
    client->left = mode == DOWN || mode == UP ? size : 1;
    if (mode == UP)
        return push(client);
    watch(client->fd, client, &client->watched, EPOLLIN);
    if (mode == STAND)
        settle(client, true);
    return true;
}

/* Something has come.  False: the connection is over, or that was no answer (a TLS alert, for one). */
static bool take(struct client *client)
{
    ssize_t count = recv(client->fd, bulk, BULK, mode == DOWN ? MSG_TRUNC : 0); /* see attend() */
    if (count < 0 && errno == EAGAIN)
        return true;
    if (count <= 0 || client->state != WAITING || (uint64_t)count > client->left || *bulk != ANSWER)
        return false;
    bytes += mode == DOWN ? count : 0;
    if (!(client->left -= count))
        settle(client, true);
    return true;
}

static void read_hellos(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        fail(path);
    hellos_size = ftell(file);
    rewind(file);
    if (!(hellos = malloc(hellos_size)) || fread(hellos, 1, hellos_size, file) != hellos_size)
        fail(path);
    fclose(file);
    size_t at = 0;
    while (at + RECORD_HEADER <= hellos_size)
        at += RECORD_HEADER + (((unsigned char)hellos[at + 3] << 8) | (unsigned char)hellos[at + 4]);
    if (!hellos_size || at != hellos_size) {
        fprintf(stderr, "%s: not TLS records\n", path);
        exit(1);
    }
}

static int ascending(const void *one, const void *other)
{
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

static double microseconds(double quantile)
{
    return times_count ? 1e6 * times[(size_t)(quantile * (times_count - 1))] : 0;
}

static void report(void)
{
    double elapsed = now() - clock_start;
    qsort(times, times_count, sizeof *times, ascending);
    printf("n=%zu failures=%zu seconds=%.6f rate=%.1f p50_us=%.1f p90_us=%.1f p99_us=%.1f max_us=%.1f mb_s=%.1f\n",
           times_count, failures, elapsed, times_count / elapsed, microseconds(0.5), microseconds(0.9),
           microseconds(0.99), microseconds(1), bytes / elapsed / 1e6);
}

static void load(void)
{
    struct epoll_event events[EVENTS], input = {.events = EPOLLIN, .data.ptr = &told_to_end};
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    if (timer < 0 || !(clients = calloc(clients_count, sizeof *clients)))
        fail("clients");
    if (every) { /* epoll_wait's own clock has milliseconds */
        struct timespec tick = {.tv_nsec = at_most(1e9 * every / clients_count, 999999999)};
        timerfd_settime(timer, 0, &(struct itimerspec){tick, tick}, NULL);
        watch(timer, &timer, &(uint32_t){0}, EPOLLIN);
    }
    epoll_ctl(poller, EPOLL_CTL_ADD, STDIN_FILENO, &input); /* refused for /dev/null, which is no end */
    memset(bulk, ANSWER, BULK);
    if (mode <= UP)
        start_clock();
    while (started < clients_count && (mode <= UP || started < OPENING))
        begin(&clients[started++]);
    while (!is_over() || working) {
        bool is_open_ended = ticking && !is_over();
        double timeout = is_open_ended ? fmax(0, clock_end - now()) : PATIENCE;
        int count = epoll_wait(poller, events, EVENTS, ceil(1e3 * fmin(timeout, 1e6)));
        if (!count && !is_open_ended) {
            failures += working;
            break;
        }
        for (int i = 0; i < count; i++) {
            struct client *client = events[i].data.ptr;
            if (events[i].data.ptr == &told_to_end) {
                told_to_end = !read(STDIN_FILENO, &(char){0}, 1);
            } else if (events[i].data.ptr == &timer) {
                bool is_tick = read(timer, &(uint64_t){0}, sizeof(uint64_t)) > 0;
                for (size_t j = 0; is_tick && ticking && j < clients_count; j++)
                    ping_if_due(&clients[j]);
            } else if (!(client->state == CONNECTING ? introduce(client)
                         : client->state == SENDING  ? push(client)
                                                     : take(client))) {
                settle(client, false);
            }
        }
    }
    report();
}

/* -- the command line ---------------------------------------------------------------------------- */

static void run_as_tunnel(int count, char **words)
{
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(TUNNEL_CORE, &cores);
    sched_setaffinity(0, sizeof cores, &cores);
    for (int i = 0; i < count - 1; i++) {
        char *colon = strrchr(words[i + 1], ':');
        if (!strcmp(words[i], "--url") && colon) {
            *colon = 0;
            serve(address_of(words[i + 1], colon + 1));
        }
    }
}

static bool run_as_client(int count, char **words)
{
    while (strcmp(words[0], MODES[mode]))
        if (++mode > STAND)
            return false;
    router = address_of(words[1], words[2]);
    read_hellos(words[3]);
    if (count % 2) /* an option without its value */
        return false;
    for (int i = 4; i < count; i += 2) {
        double value = atof(words[i + 1]);
        if (!strcmp(words[i], "--clients"))
            clients_count = value;
        else if (!strcmp(words[i], "--seconds"))
            seconds = value;
        else if (!strcmp(words[i], "--size"))
            size = value;
        else if (!strcmp(words[i], "--every"))
            every = value / 1e3;
        else
            return false;
    }
    load();
    return true;
}

int main(int count, char **words)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0)
        fail("epoll_create1");
    if (count == 4 && !strcmp(words[1], "backend"))
        serve(address_of(words[2], words[3]));
    else if (count > 4 && !strcmp(words[1], "access"))
        run_as_tunnel(count - 2, words + 2);
    else if (count > 4 && run_as_client(count - 1, words + 1))
        return 0;
    fprintf(stderr, "usage: see the comment at the beginning of load.c\n");
    return 2;
}
