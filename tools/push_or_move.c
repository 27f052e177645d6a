// Measures when KVM moves an irqfd faster by a new routing table, and when by disarming it and arming it at another GSI.
//
// usage: cc -O2 -pthread -o target/push_or_move tools/push_or_move.c -lm && target/push_or_move [SECONDS [LOAD...]]
//
// Needs /dev/kvm and 4,100 descriptors. SECONDS is for each size under each load (1 by default); all loads by default:
//     idle      nothing else runs, the caller is wherever the scheduler puts it
//     first     the same, the caller stays on CPU 0, where the kernel's grace periods end as a rule
//     last      the same, the caller stays on the last CPU
//     busy1     a thread loops; busy2: two
//     halted    each VM has a vCPU in KVM_RUN, halted; spinning: in a loop
//     signals   a thread signals irqfds of both VMs without pause
// Run it on the machine that you care about: the figures are its own.
//
// For each number of armed irqfds there are two VMs: one whose table has an entry for each irqfd (and one more) besides the
// 40 of the pins, and one whose table has 4,000 entries in all. A round is a block of each kind of change in turn, so that
// a busy machine meets all kinds alike:
//     push        KVM_SET_GSI_ROUTING, one entry changed
//     move        KVM_IRQFD to disarm one irqfd, KVM_IRQFD to arm it at another GSI with an entry
//     move/4000   the same where the table has 4,000 entries
// What is printed: of the blocks' means the median in microseconds (push/4000, a push of 4,000 entries, is measured by
// itself afterwards, since it moves the caller to another CPU); of the ratios round by round the median with the quartiles.
// Last, by load, the size from which on a move is the faster one, by interpolation of the logarithms.
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { PINS = 40, FIRST_GSI = 24, LARGE = 4000, BLOCK = 200, FEW = 8, MOST_ROUNDS = 20000, LEAST_ROUNDS = 3 };
enum { PUSH, MOVE, MOVE_LARGE, KINDS };

static const int SIZES[] = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2000};
enum { SIZE_COUNT = sizeof SIZES / sizeof *SIZES };
static const char *const LOADS[] = {"idle", "first", "last", "busy1", "busy2", "halted", "spinning", "signals"};
enum { LOAD_COUNT = sizeof LOADS / sizeof *LOADS };

struct vm {
    int fd, vcpu;
    int armed;     // irqfds
    int messages;  // MSI entries in the table
    int *event;    // by irqfd
    int *gsi;      // by irqfd: where it is armed
    struct kvm_irq_routing *table;
    void *code;
    int next;      // irqfd to change
};

static int kvm;
static atomic_int resting;

static int call(int fd, unsigned long request, const void *argument, const char *name) {
    int result = ioctl(fd, request, argument);
    if (result < 0)
        err(1, "%s", name);
    return result;
}

static void push(struct vm *vm) { call(vm->fd, KVM_SET_GSI_ROUTING, vm->table, "KVM_SET_GSI_ROUTING"); }

static void irqfd(struct vm *vm, int index, unsigned flags) {
    struct kvm_irqfd argument = {.fd = vm->event[index], .gsi = vm->gsi[index], .flags = flags};
    call(vm->fd, KVM_IRQFD, &argument, "KVM_IRQFD");
}

// The entries that KVM itself makes with its interrupt controllers: GSIs 0-15 on PIC and IOAPIC, 16-23 on the IOAPIC.
static void pins(struct kvm_irq_routing *table) {
    for (int pin = 0; pin < 24; pin++) {
        table->entries[table->nr++] = (struct kvm_irq_routing_entry){
            .gsi = pin, .type = KVM_IRQ_ROUTING_IRQCHIP, .u.irqchip = {KVM_IRQCHIP_IOAPIC, pin}};
        if (pin < 16)
            table->entries[table->nr++] = (struct kvm_irq_routing_entry){
                .gsi = pin, .type = KVM_IRQ_ROUTING_IRQCHIP,
                .u.irqchip = {pin < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, pin % 8}};
    }
}

static void *run(void *vcpu) {
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
    for (;;)
        ioctl((int)(intptr_t)vcpu, KVM_RUN, 0);
    return NULL;
}

static void set_vcpu(struct vm *vm) {
    vm->code = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {
        .guest_phys_addr = 0x1000, .memory_size = 4096, .userspace_addr = (uintptr_t)vm->code};
    call(vm->fd, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
    struct kvm_sregs segments;
    call(vm->vcpu, KVM_GET_SREGS, &segments, "KVM_GET_SREGS");
    segments.cs.base = segments.cs.selector = 0;
    call(vm->vcpu, KVM_SET_SREGS, &segments, "KVM_SET_SREGS");
    struct kvm_regs registers = {.rip = 0x1000, .rflags = 2};
    call(vm->vcpu, KVM_SET_REGS, &registers, "KVM_SET_REGS");
}

static struct vm opened(int armed, int messages) {
    struct vm vm = {.armed = armed, .messages = messages};
    vm.fd = call(kvm, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
    call(vm.fd, KVM_CREATE_IRQCHIP, NULL, "KVM_CREATE_IRQCHIP");
    vm.vcpu = call(vm.fd, KVM_CREATE_VCPU, NULL, "KVM_CREATE_VCPU");
    set_vcpu(&vm);
    vm.table = calloc(1, sizeof *vm.table + (PINS + messages) * sizeof vm.table->entries[0]);
    pins(vm.table);
    for (int index = 0; index < messages; index++)
        vm.table->entries[vm.table->nr++] = (struct kvm_irq_routing_entry){
            .gsi = FIRST_GSI + index, .type = KVM_IRQ_ROUTING_MSI, .u.msi = {.address_lo = 0xFEE00000, .data = 0x40}};
    push(&vm);
    vm.event = calloc(armed, sizeof *vm.event);
    vm.gsi = calloc(armed, sizeof *vm.gsi);
    for (int index = 0; index < armed; index++) {
        vm.event[index] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        if (vm.event[index] < 0)
            err(1, "eventfd");
        vm.gsi[index] = FIRST_GSI + index;
        irqfd(&vm, index, 0);
    }
    return vm;
}

static void closed(struct vm *vm) {
    for (int index = 0; index < vm->armed; index++)
        close(vm->event[index]);
    close(vm->vcpu);
    close(vm->fd);
    munmap(vm->code, 4096);
    free(vm->event);
    free(vm->gsi);
    free(vm->table);
}

static void change_by_push(struct vm *vm) {
    vm->table->entries[PINS + vm->next].u.msi.data ^= 1;
    push(vm);
}

static void change_by_move(struct vm *vm) {
    irqfd(vm, vm->next, KVM_IRQFD_FLAG_DEASSIGN);
    vm->gsi[vm->next] = FIRST_GSI + (vm->gsi[vm->next] - FIRST_GSI + 1) % vm->messages;
    irqfd(vm, vm->next, 0);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

// Microseconds that one change takes, over a number of them.
static double timed(void (*change)(struct vm *), struct vm *vm, int times) {
    double begin = now();
    for (int count = 0; count < times; count++) {
        vm->next = (vm->next + 1) % vm->armed;
        change(vm);
    }
    return (now() - begin) / times * 1e6;
}

static void stay_on(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int each = 0; each < sysconf(_SC_NPROCESSORS_ONLN); each++)
        if (cpu < 0 || each == cpu)
            CPU_SET(each, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void *spin(void *unused) {
    while (!resting)
        ;
    return unused;
}

static void *signals(void *vms) {
    for (struct vm *vm = vms; !resting;)
        for (int which = 0; which < 2; which++)
            for (int index = 0; index < vm[which].armed && index < 16; index++)
                if (eventfd_write(vm[which].event[index], 1))
                    err(1, "eventfd_write");
    return NULL;
}

static int started(const char *load, struct vm *vms, pthread_t *threads) {
    int count = 0;
    resting = 0;
    if (!strncmp(load, "busy", 4))
        for (; count < load[4] - '0'; count++)
            pthread_create(&threads[count], NULL, spin, NULL);
    if (!strcmp(load, "signals"))
        pthread_create(&threads[count++], NULL, signals, vms);
    if (!strcmp(load, "halted") || !strcmp(load, "spinning"))
        for (; count < 2; count++) {
            memcpy(vms[count].code, load[0] == 'h' ? "\xf4\xeb\xfd" : "\xeb\xfe", load[0] == 'h' ? 3 : 2);
            pthread_create(&threads[count], NULL, run, (void *)(intptr_t)vms[count].vcpu);
        }
    stay_on(!strcmp(load, "first") ? 0 : !strcmp(load, "last") ? sysconf(_SC_NPROCESSORS_ONLN) - 1 : -1);
    usleep(20000);
    return count;
}

static int smaller(const void *left, const void *right) {
    double difference = *(const double *)left - *(const double *)right;
    return (difference > 0) - (difference < 0);
}

static double quantile(double *values, int count, double share) {
    qsort(values, count, sizeof *values, smaller);
    return values[(int)(share * (count - 1))];
}

static double ratio(double (*rounds)[KINDS], int count, int above, int below, double share) {
    static double ratios[MOST_ROUNDS];
    for (int round = 0; round < count; round++)
        ratios[round] = rounds[round][above] / rounds[round][below];
    return quantile(ratios, count, share);
}

// Measures and prints one size under one load; the ratios push : move and push : move/4000 are left in `ratios`.
static void measure(const char *load, int size, double seconds, double *ratios) {
    static double rounds[MOST_ROUNDS][KINDS], column[MOST_ROUNDS];
    struct vm vms[2] = {opened(size, size + 1), opened(size, LARGE - PINS)};
    pthread_t threads[2];
    int count = 0, thread_count = started(load, vms, threads);
    timed(change_by_push, &vms[0], FEW);
    timed(change_by_move, &vms[0], FEW);
    for (double until = now() + seconds; count < MOST_ROUNDS && (count < LEAST_ROUNDS || now() < until);) {
        double *round = rounds[count++];
        round[PUSH] = timed(change_by_push, &vms[0], BLOCK);
        round[MOVE] = timed(change_by_move, &vms[0], BLOCK);
        round[MOVE_LARGE] = timed(change_by_move, &vms[1], BLOCK);
    }
    double large = timed(change_by_push, &vms[1], FEW);
    resting = 1;
    for (int thread = 0; thread < thread_count; thread++) {
        pthread_cancel(threads[thread]);
        pthread_join(threads[thread], NULL);
    }
    printf("| %s | %d ", load, size);
    for (int kind = 0; kind < KINDS; kind++) {
        for (int round = 0; round < count; round++)
            column[round] = rounds[round][kind];
        printf("| %.1f ", quantile(column, count, .5));
    }
    printf("| %.0f ", large);
    for (int kind = MOVE; kind <= MOVE_LARGE; kind++) {
        ratios[kind - MOVE] = ratio(rounds, count, PUSH, kind, .5);
        printf("| %.2f (%.2f-%.2f) ", ratios[kind - MOVE], ratio(rounds, count, PUSH, kind, .25),
               ratio(rounds, count, PUSH, kind, .75));
    }
    printf("| %d |\n", count);
    closed(&vms[0]);
    closed(&vms[1]);
}

// The size at which the ratio first passes 1.
static double crossing(double (*ratios)[2], int column) {
    for (int at = 0; at < SIZE_COUNT; at++)
        if (ratios[at][column] >= 1) {
            if (at == 0)
                return SIZES[0];
            double low = log(ratios[at - 1][column]), high = log(ratios[at][column]);
            return exp(log(SIZES[at - 1]) + log((double)SIZES[at] / SIZES[at - 1]) * -low / (high - low));
        }
    return INFINITY;
}

int main(int count, char **arguments) {
    double seconds = count > 1 ? atof(arguments[1]) : 1, ratios[SIZE_COUNT][2];
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        err(1, "/dev/kvm");
    int given = count > 2 ? count - 2 : LOAD_COUNT;
    const char *const *loads = count > 2 ? (const char *const *)arguments + 2 : LOADS;
    setlinebuf(stdout);
    printf("| load | irqfds | push, us | move, us | move/4000, us | push/4000, us | push : move | push : move/4000 | rounds |\n");
    printf("|---|---|---|---|---|---|---|---|---|\n");
    for (int load = 0; load < given; load++) {
        for (int at = 0; at < SIZE_COUNT; at++)
            measure(loads[load], SIZES[at], seconds, ratios[at]);
        printf("%s: a move is faster from %.0f irqfds on; from %.0f on in a table of 4,000\n", loads[load],
               crossing(ratios, 0), crossing(ratios, 1));
    }
}
