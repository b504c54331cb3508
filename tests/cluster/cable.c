/* A cable with a latency: cable PORT NAMESPACE CARD LATENCY_US
 *
 * Makes two network cards, PORT here and CARD in the network namespace that the file NAMESPACE stands for, and hands
 * each frame that one of them sends to the other LATENCY_US microseconds later. It goes into the background when both
 * are there, and ends when one of them is deleted. netem, which is not in every kernel, would do the same.
 *
 * Frames keep their virtio header, so that the kernel hands over up to 64 KiB of a stream at once.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum {
    LARGEST_FRAME = 70000, /* 64 KiB and headers */
    MOST_UNDER_WAY = 64 << 20, /* bytes in one direction; what would be more is lost */
    AT_ONCE = 32, /* frames taken before those that are due get their turn */
};

struct frame {
    struct frame *next;
    int64_t due_ns;
    ssize_t bytes;
    char content[];
};

/* A direction of the cable. All frames wait for the same time, so they leave in the order in which they came. */
struct direction {
    int from, to;
    struct frame *first, **end;
    ssize_t under_way;
};

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* A network card of the namespace this process is in: the frames it sends are read from the result. */
static int make_card(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int card = open("/dev/net/tun", O_RDWR | O_NONBLOCK);

    if (card < 0)
        fail("/dev/net/tun");
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (ioctl(card, TUNSETIFF, &request) < 0 || ioctl(card, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) < 0)
        fail(name);
    return card;
}

static void enter(const char *namespace)
{
    int file = open(namespace, O_RDONLY);

    if (file < 0 || setns(file, CLONE_NEWNET) < 0)
        fail(namespace);
    close(file);
}

static void take(struct direction *way, int64_t latency_ns)
{
    static char content[LARGEST_FRAME];
    ssize_t bytes;

    for (int i = 0; i < AT_ONCE && (bytes = read(way->from, content, sizeof content)) > 0; i++) {
        struct frame *frame = NULL;
        if (way->under_way + bytes <= MOST_UNDER_WAY)
            frame = malloc(sizeof *frame + bytes);
        if (frame == NULL)
            continue;
        *frame = (struct frame){.due_ns = now_ns() + latency_ns, .bytes = bytes};
        memcpy(frame->content, content, bytes);
        *way->end = frame;
        way->end = &frame->next;
        way->under_way += bytes;
    }
}

static void deliver(struct direction *way)
{
    int64_t now = now_ns();

    for (struct frame *frame; (frame = way->first) != NULL && frame->due_ns <= now; free(frame)) {
        if (write(way->to, frame->content, frame->bytes) < 0) {
            /* That card is down: the frame is lost, as on a cable that is cut. */
        }
        way->first = frame->next;
        if (way->first == NULL)
            way->end = &way->first;
        way->under_way -= frame->bytes;
    }
}

/* Until a frame comes or the next one is due. Ends the process when a card is gone. */
static void await(struct pollfd cards[2], const struct direction ways[2])
{
    int64_t wait_ns = INT64_MAX, now = now_ns();

    for (int i = 0; i < 2; i++)
        if (ways[i].first != NULL && ways[i].first->due_ns - now < wait_ns)
            wait_ns = ways[i].first->due_ns > now ? ways[i].first->due_ns - now : 0;
    struct timespec wait = {wait_ns / 1000000000, wait_ns % 1000000000};
    ppoll(cards, 2, wait_ns == INT64_MAX ? NULL : &wait, NULL);
    if ((cards[0].revents | cards[1].revents) & POLLERR)
        exit(0);
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: cable PORT NAMESPACE CARD LATENCY_US\n");
        return 2;
    }
    int port = make_card(argv[1]);
    enter(argv[2]);
    int card = make_card(argv[3]);
    int64_t latency_ns = atoll(argv[4]) * 1000;
    struct direction ways[2] = {{.from = port, .to = card}, {.from = card, .to = port}};
    struct pollfd cards[2] = {{.fd = port, .events = POLLIN}, {.fd = card, .events = POLLIN}};

    if (daemon(0, 0) < 0)
        fail("daemon");
    /* A cable does not wait for a core that computes. Only root may ask for that; for others it is late at times. */
    sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1});
    ways[0].end = &ways[0].first;
    ways[1].end = &ways[1].first;
    for (;;) {
        await(cards, ways);
        for (int i = 0; i < 2; i++) {
            deliver(&ways[i]);
            if (cards[i].revents & POLLIN)
                take(&ways[i], latency_ns);
        }
    }
}
