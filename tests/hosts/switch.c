/* An Ethernet switch in user space: one TAP device in the network namespace of every pretend host.
 *
 *     switch NAME...
 *
 * Knows: frames, ports, time. Must not know: what a host is, or what the hosts run.
 *
 * Every port is a full-duplex cable between its host and the switch. Each direction has a delay, a rate and a loss, so a
 * frame on its way from A to B waits for A's cable, takes length/rate and A's delay to the switch, waits for B's cable,
 * and takes length/rate and B's delay to B. TAP offloads are off: a frame is what would be on a wire.
 *
 * Commands come on standard input, one a line; each is answered by a line, "ok" or what is wrong. The end of standard
 * input ends the switch.
 *
 *     attach NAME PID               plug NAME's cable into the network namespace of process PID, as eth0
 *     detach NAME                   pull it out; the host's eth0 is gone
 *     cable NAME DELAY RATE LOSS UP seconds one way, bits a second, probability, 1 or 0
 *     cut A B                       frames from A to B are dropped; heal: no longer
 *     heal
 *     udp drop|pass                 all UDP between hosts
 *     firewall NAME on|off          NAME takes no UDP, and no TCP connection but to port 22
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_PORTS = 16,
    MAX_FRAME = 65536,
    MAX_LINE = 256,
    BURST = 32, /* frames read from one port before the next port has its turn */
    SSH_PORT = 22,
    REALTIME_PRIORITY = 20,
};

static const double QUEUE_SECONDS = 0.25; /* a cable with more than this waiting drops what comes next */
static const double IDLE_SECONDS = 60;

typedef struct {
    const char *name;
    int tap;                        /* -1: no cable is plugged in */
    double delay, rate, loss;       /* seconds one way, bits a second, probability; of each direction */
    bool up, firewall;
    double uplink_free, downlink_free; /* when each direction of the cable has sent what it was given */
} Port;

typedef enum { AT_SWITCH, AT_HOST } Place;

typedef struct {
    double due; /* when the frame arrives at `place` */
    long order; /* frames that are due at once keep the order in which they came */
    Place place;
    int source, target, length;
    unsigned char *bytes;
} Frame;

static Port ports[MAX_PORTS];
static int port_count;
static bool cuts[MAX_PORTS][MAX_PORTS];
static bool drops_udp;
static int home_namespace;

static Frame *heap; /* the frame that is due next is first */
static int heap_size, heap_capacity;
static long frames_seen;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* The heap of frames on their way. */

static bool is_before(const Frame *a, const Frame *b) {
    return a->due < b->due || (a->due == b->due && a->order < b->order);
}

static void swap(int a, int b) {
    Frame frame = heap[a];
    heap[a] = heap[b];
    heap[b] = frame;
}

static void push(Frame frame) {
    if (heap_size == heap_capacity) {
        heap_capacity = heap_capacity ? 2 * heap_capacity : 1024;
        heap = realloc(heap, (size_t)heap_capacity * sizeof *heap);
        if (!heap) fail("frames");
    }
    int child = heap_size++;
    heap[child] = frame;
    while (child && is_before(&heap[child], &heap[(child - 1) / 2])) {
        swap(child, (child - 1) / 2);
        child = (child - 1) / 2;
    }
}

static Frame pop(void) {
    Frame first = heap[0];
    heap[0] = heap[--heap_size];
    for (int parent = 0;;) {
        int child = 2 * parent + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && is_before(&heap[child + 1], &heap[child])) child++;
        if (!is_before(&heap[child], &heap[parent])) break;
        swap(child, parent);
        parent = child;
    }
    return first;
}

/* What becomes of a frame. */

static bool is_lost(const Port *port) { return drand48() < port->loss; }

/* Send over one direction of a cable that is free at *free: the time of arrival, or -1 where the queue is full. */
static double send_over(const Port *port, double *free_at, double start, int length) {
    if (*free_at > start) {
        if (*free_at - start > QUEUE_SECONDS) return -1;
        start = *free_at;
    }
    *free_at = start + 8.0 * length / port->rate;
    return *free_at + port->delay;
}

static bool is_filtered(const unsigned char *bytes, int length, const Port *target) {
    if (length < 14 + 20) return false;
    const int type = bytes[12] << 8 | bytes[13];
    int protocol = -1, header = 0;
    bool has_ports = true;
    if (type == 0x0800) {
        protocol = bytes[14 + 9];
        header = 14 + 4 * (bytes[14] & 15);
        has_ports = ((bytes[14 + 6] & 0x1f) | bytes[14 + 7]) == 0; /* not a later fragment */
    } else if (type == 0x86dd) {
        protocol = bytes[14 + 6];
        header = 14 + 40;
    }
    if (protocol == 17) return drops_udp || target->firewall;
    if (protocol != 6 || !target->firewall || !has_ports || length < header + 14) return false;
    const bool opens = (bytes[header + 13] & 0x12) == 0x02; /* SYN without ACK */
    return opens && (bytes[header + 2] << 8 | bytes[header + 3]) != SSH_PORT;
}

/* The port of a frame's destination address; -1 is all of them. */
static int destination(const unsigned char *bytes) {
    static const unsigned char prefix[5] = {2, 0, 0, 0, 1};
    const int port = bytes[5] - 1;
    return memcmp(bytes, prefix, sizeof prefix) == 0 && port >= 0 && port < port_count ? port : -1;
}

static void accept_frame(int source, const unsigned char *bytes, int length) {
    Port *from = &ports[source];
    if (length < 14 || !from->up) return;
    const double due = send_over(from, &from->uplink_free, now(), length);
    if (due < 0 || is_lost(from)) return;
    const int only = destination(bytes);
    for (int target = 0; target < port_count; target++) {
        if (target == source || (only >= 0 && target != only) || cuts[source][target]) continue;
        if (is_filtered(bytes, length, &ports[target])) continue;
        unsigned char *copy = malloc((size_t)length);
        if (!copy) fail("frame");
        memcpy(copy, bytes, (size_t)length);
        push((Frame){due, frames_seen++, AT_SWITCH, source, target, length, copy});
    }
}

/* Move every frame on that has arrived somewhere. */
static void forward(void) {
    while (heap_size && heap[0].due <= now()) {
        Frame frame = pop();
        Port *to = &ports[frame.target];
        if (to->tap < 0 || !to->up) {
            free(frame.bytes);
        } else if (frame.place == AT_SWITCH) {
            const double due = send_over(to, &to->downlink_free, frame.due, frame.length);
            if (due < 0 || is_lost(to)) {
                free(frame.bytes);
            } else {
                frame.due = due;
                frame.place = AT_HOST;
                push(frame);
            }
        } else {
            /* A host that cannot take a frame (its eth0 is down) loses it, as on a wire. */
            if (write(to->tap, frame.bytes, (size_t)frame.length) < 0) errno = 0;
            free(frame.bytes);
        }
    }
}

static void detach(Port *port) {
    if (port->tap >= 0) close(port->tap);
    port->tap = -1;
}

static void read_port(int source) {
    static unsigned char bytes[MAX_FRAME];
    for (int n = 0; n < BURST; n++) {
        const ssize_t length = read(ports[source].tap, bytes, sizeof bytes);
        if (length < 0 && errno != EAGAIN && errno != EINTR) detach(&ports[source]); /* the host was switched off */
        if (length <= 0) return;
        accept_frame(source, bytes, (int)length);
    }
}

/* Commands. */

static void reply(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vprintf(format, values);
    va_end(values);
    putchar('\n');
    fflush(stdout);
}

static Port *find(const char *name) {
    for (int i = 0; i < port_count; i++)
        if (!strcmp(name, ports[i].name)) return &ports[i];
    return NULL;
}

/* Make eth0 in the network namespace that the caller has entered. */
static int make_tap(const Port *port) {
    const int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    const int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {.ifr_name = "eth0"};
    request.ifr_flags = IFF_TAP | IFF_NO_PI;
    bool made = tap >= 0 && control >= 0 && ioctl(tap, TUNSETIFF, &request) == 0 && ioctl(tap, TUNSETOFFLOAD, 0) == 0;
    if (made) {
        const unsigned char address[6] = {2, 0, 0, 0, 1, (unsigned char)(port - ports + 1)};
        request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
        memcpy(request.ifr_hwaddr.sa_data, address, sizeof address);
        made = ioctl(control, SIOCSIFHWADDR, &request) == 0;
    }
    const int reason = errno;
    if (control >= 0) close(control);
    if (!made && tap >= 0) close(tap);
    errno = reason;
    return made ? tap : -1;
}

static void attach(Port *port, long pid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%ld/ns/net", pid);
    const int namespace = open(path, O_RDONLY | O_CLOEXEC);
    if (namespace < 0 || setns(namespace, CLONE_NEWNET)) {
        reply("cannot enter the network of process %ld: %s", pid, strerror(errno));
        if (namespace >= 0) close(namespace);
        return;
    }
    close(namespace);
    detach(port);
    port->tap = make_tap(port);
    const int reason = errno;
    if (setns(home_namespace, CLONE_NEWNET)) fail("home");
    port->uplink_free = port->downlink_free = 0;
    if (port->tap < 0)
        reply("cannot make a TAP device: %s", strerror(reason));
    else
        reply("ok");
}

static void execute(const char *line) {
    char first[64], second[64];
    double delay, rate, loss;
    int up;
    long pid;
    Port *a = NULL, *b = NULL;
    if (sscanf(line, "attach %63s %ld", first, &pid) == 2 && (a = find(first))) {
        attach(a, pid);
        return;
    }
    if (sscanf(line, "cable %63s %lf %lf %lf %d", first, &delay, &rate, &loss, &up) == 5 && (a = find(first)) && rate > 0) {
        a->delay = delay;
        a->rate = rate;
        a->loss = loss;
        a->up = up;
    } else if (sscanf(line, "cut %63s %63s", first, second) == 2 && (a = find(first)) && (b = find(second))) {
        cuts[a - ports][b - ports] = true;
    } else if (sscanf(line, "firewall %63s %63s", first, second) == 2 && (a = find(first))) {
        a->firewall = !strcmp(second, "on");
    } else if (sscanf(line, "detach %63s", first) == 1 && (a = find(first))) {
        detach(a);
    } else if (sscanf(line, "udp %63s", first) == 1) {
        drops_udp = !strcmp(first, "drop");
    } else if (!strcmp(line, "heal")) {
        memset(cuts, 0, sizeof cuts);
    } else {
        reply("not a command, or no such host: %s", line);
        return;
    }
    reply("ok");
}

static void read_commands(void) {
    static char text[4 * MAX_LINE];
    static size_t filled;
    const ssize_t got = read(STDIN_FILENO, text + filled, sizeof text - 1 - filled);
    if (got <= 0) exit(0);
    filled += (size_t)got;
    text[filled] = 0;
    char *line = text;
    for (char *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        execute(line);
    }
    filled = strlen(line);
    if (filled >= sizeof text - 1) exit(1);
    memmove(text, line, filled + 1);
}

/* Sleep until a frame is due, a host sends one, or a command comes. */
static void wait_for_work(struct pollfd *polled) {
    const double wait = heap_size ? heap[0].due - now() : IDLE_SECONDS;
    struct timespec limit = {0, 0};
    if (wait > 0) {
        limit.tv_sec = (time_t)wait;
        limit.tv_nsec = (long)((wait - (double)limit.tv_sec) * 1e9);
    }
    polled[0] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
    for (int i = 0; i < port_count; i++) polled[1 + i] = (struct pollfd){.fd = ports[i].tap, .events = POLLIN};
    if (ppoll(polled, (nfds_t)port_count + 1, &limit, NULL) < 0)
        for (int i = 0; i <= port_count; i++) polled[i].revents = 0;
}

int main(int count, char **names) {
    if (count < 2 || count - 1 > MAX_PORTS) {
        fprintf(stderr, "switch: name 1 to %d hosts\n", MAX_PORTS);
        return 2;
    }
    port_count = count - 1;
    for (int i = 0; i < port_count; i++) ports[i] = (Port){.name = names[1 + i], .tap = -1, .rate = 1e9, .up = true};
    home_namespace = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (home_namespace < 0) fail("/proc/self/ns/net");
    /* All three make delays exact where they are allowed; without them they are as exact as the machine is idle. */
    prctl(PR_SET_TIMERSLACK, 1);
    const bool realtime = sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){REALTIME_PRIORITY}) == 0;
    if (mlockall(MCL_CURRENT | MCL_FUTURE)) errno = 0;
    reply(realtime ? "ok: real-time" : "ok");

    struct pollfd polled[1 + MAX_PORTS];
    for (;;) {
        forward();
        wait_for_work(polled);
        for (int i = 0; i < port_count; i++)
            if (polled[1 + i].revents) read_port(i);
        if (polled[0].revents) read_commands();
    }
}
