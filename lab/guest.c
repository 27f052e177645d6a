/*
 * The only program of the lab's Linux guest: it exercises its disks while it moves, masks and unbinds their interrupts.
 *
 * Workers on every CPU write blocks with content of their own and read them back. Meanwhile the main process
 *   - moves the disks' interrupts among the CPUs (/proc/irq/N/smp_affinity_list), where the kernel allows it,
 *   - masks them by the function mask and by the mask bit of each vector, until the device shows a pending bit,
 *   - takes CPUs off line, which moves the interrupts that the kernel has bound to them,
 *   - unbinds and binds the disk's driver and the bus's (the workers rest meanwhile).
 * Each step waits until the workers have done more I/O. In the end every block is read once more.
 *
 * Prints "guest: begins NAME" before each kind of steps, "guest: NAME NUMBER" for each count, "guest: done" if all went
 * well, and the kernel's warnings as "kernel: TEXT". The numbers of rounds come from the kernel's command line: moves=,
 * masks=, offline=, unbind=.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define BLOCKS 2048		/* of each disk */
#define MAX_DISKS 4
#define WORKERS 4		/* for each disk */
#define STEP 8			/* I/Os of each disk between two steps */
#define PATIENCE 60		/* seconds in which a step must happen */
#define PENDING_BITS 0x8000	/* offsets in the device's BAR 0 */
#define TABLE 0x4000

struct shared {
	atomic_int stop, spread, settled;	/* spread: workers may run on any CPU; settled: how many have obeyed */
	struct disk {
		atomic_ulong reads, writes, flushes, done, slowest_us;
		uint32_t generations[BLOCKS];
	} disks[MAX_DISKS];
};

static struct shared *shared;
static int disks, cpus;
static pid_t workers[MAX_DISKS * WORKERS];

static void finish(void)
{
	fflush(stdout);
	tcdrain(1);
	reboot(RB_AUTOBOOT);
}

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
	va_list arguments;

	printf("guest: failed: ");
	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf(" (%s)\n", strerror(errno));
	fflush(stdout);
	if (getpid() == 1)
		finish();
	_exit(1);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

/* Announces a kind of steps, and returns how many there are. */
static int rounds(const char *name)
{
	const char *value = getenv(name);

	printf("guest: begins %s\n", name);
	fflush(stdout);
	return value ? atoi(value) : 0;
}

/* Writes a word to a file of the kernel's; returns whether it took it. */
static int tell(const char *path, const char *word)
{
	int fd = open(path, O_WRONLY), ok;

	if (fd < 0)
		fail("open %s", path);
	ok = write(fd, word, strlen(word)) == (ssize_t)strlen(word);
	close(fd);
	return ok;
}

static void must_tell(const char *path, const char *word)
{
	if (!tell(path, word))
		fail("write %s to %s", word, path);
}

/* ---- the workers ---- */

static void fill(uint64_t *block, int disk, uint32_t number, uint32_t generation)
{
	uint64_t value = ((uint64_t)disk << 48 ^ (uint64_t)number << 32 ^ generation) * 0x9E3779B97F4A7C15u;

	for (int at = 0; at < BLOCK / 8; at++)
		block[at] = generation ? value += 0x2545F4914F6CDD1Du : 0;
}

static int open_disk(int disk)
{
	char path[] = "/dev/vda";
	int fd;

	path[7] += disk;
	fd = open(path, O_RDWR | O_DIRECT);
	if (fd < 0)
		fail("open %s", path);
	return fd;
}

static void check(const uint64_t *block, int disk, uint32_t number, uint32_t generation)
{
	static uint64_t expected[BLOCK / 8];

	fill(expected, disk, number, generation);
	for (int at = 0; at < BLOCK / 8; at++)
		if (block[at] != expected[at])
			fail("disk %d, block %u, byte %d: %016lx in place of %016lx", disk, number, 8 * at,
			     (unsigned long)block[at], (unsigned long)expected[at]);
}

static void __attribute__((noreturn)) work(int disk, int worker)
{
	struct disk *our = &shared->disks[disk];
	uint64_t random = 88172645463325252u + 1000 * disk + worker, *buffer;
	uint32_t number, count, first;
	int fd = open_disk(disk);
	int spread = -1;

	if (posix_memalign((void **)&buffer, BLOCK, 8 * BLOCK))
		fail("memory");
	for (unsigned turn = 0; !shared->stop; turn++) {
		double begin;
		unsigned long took;

		if (spread != shared->spread) {
			cpu_set_t set;

			spread = shared->spread;
			CPU_ZERO(&set);
			for (int cpu = 0; cpu < cpus; cpu++)
				if (spread || cpu == worker % cpus)
					CPU_SET(cpu, &set);
			if (sched_setaffinity(0, sizeof(set), &set))
				fail("sched_setaffinity");
			shared->settled++;
		}
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		/* Worker w has the blocks w * n to (w + 1) * n. */
		number = BLOCKS / WORKERS;
		count = 1 + (random >> 40) % 8;
		first = worker * number + (random >> 16) % (number - count);
		begin = now();
		if (turn % 64 == 63) {
			if (fdatasync(fd))
				fail("flush disk %d", disk);
			our->flushes++;
		} else if (random >> 60 & 1) {
			for (uint32_t at = 0; at < count; at++)
				fill(buffer + at * BLOCK / 8, disk, first + at, ++our->generations[first + at]);
			if (pwrite(fd, buffer, count * BLOCK, (off_t)first * BLOCK) != count * BLOCK)
				fail("write disk %d, block %u", disk, first);
			our->writes++;
		} else {
			if (pread(fd, buffer, count * BLOCK, (off_t)first * BLOCK) != count * BLOCK)
				fail("read disk %d, block %u", disk, first);
			for (uint32_t at = 0; at < count; at++)
				check(buffer + at * BLOCK / 8, disk, first + at, our->generations[first + at]);
			our->reads++;
		}
		took = (now() - begin) * 1e6;
		if (took > our->slowest_us)
			our->slowest_us = took;
		our->done++;
	}
	_exit(0);
}

static void start(void)
{
	shared->stop = 0;
	for (int number = 0; number < disks * WORKERS; number++) {
		workers[number] = fork();
		if (workers[number] < 0)
			fail("fork");
		if (workers[number] == 0)
			work(number / WORKERS, number % WORKERS);
	}
}

static void stop(void)
{
	int status;

	shared->stop = 1;
	for (int number = 0; number < disks * WORKERS; number++)
		if (waitpid(workers[number], &status, 0) < 0 || status)
			fail("a worker of disk %d ended with status %d", number / WORKERS, status);
}

static void nap(void)
{
	int status;
	pid_t ended = waitpid(-1, &status, WNOHANG);

	if (ended > 0 && status)
		fail("a worker ended with status %d", status);
	nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
}

/* Waits until every disk has done some more I/O. */
static void progress(const char *during)
{
	unsigned long before[MAX_DISKS];
	double deadline = now() + PATIENCE;

	for (int disk = 0; disk < disks; disk++)
		before[disk] = shared->disks[disk].done;
	for (int disk = 0; disk < disks; disk++)
		while (shared->disks[disk].done < before[disk] + STEP) {
			if (now() > deadline)
				fail("no I/O on disk %d for %d s: %s", disk, PATIENCE, during);
			nap();
		}
}

/* ---- what is done to their interrupts ---- */

/* A disk's PCI function, for instance "0000:00:01.0". */
static void pci_name(int disk, char *name)
{
	char link[] = "/sys/block/vda", target[512];
	ssize_t length;
	char *at;

	link[13] += disk;
	length = readlink(link, target, sizeof(target) - 1);
	if (length < 0)
		fail("readlink %s", link);
	target[length] = 0;
	at = strstr(target, "0000:00:");
	if (!at)
		fail("no PCI function in %s", target);
	snprintf(name, 13, "%.12s", at);
}

static void virtio_name(int disk, char *name)
{
	char path[64], pci[13];
	struct dirent *entry;
	DIR *directory;

	pci_name(disk, pci);
	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s", pci);
	directory = opendir(path);
	while (directory && (entry = readdir(directory)))
		if (!strncmp(entry->d_name, "virtio", 6) && isdigit(entry->d_name[6])) {
			snprintf(name, 13, "%.12s", entry->d_name);
			closedir(directory);
			return;
		}
	fail("%s has no virtio device", path);
}

/* The next of a disk's interrupts after `irq`, or -1. */
static int next_irq(int disk, int irq)
{
	char path[64], pci[13];
	struct dirent *entry;
	DIR *directory;
	int found = -1;

	pci_name(disk, pci);
	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/msi_irqs", pci);
	directory = opendir(path);
	if (!directory)
		fail("opendir %s", path);
	while ((entry = readdir(directory)))
		if (isdigit(entry->d_name[0])) {
			int number = atoi(entry->d_name);

			if (number > irq && (found < 0 || number < found))
				found = number;
		}
	closedir(directory);
	return found;
}

/* How often an interrupt has arrived on a CPU. */
static unsigned long arrived(int irq, int cpu)
{
	static char text[16384];
	char start[16], *line;
	int fd = open("/proc/interrupts", O_RDONLY);
	ssize_t length = 0, more;
	unsigned long count = 0;

	while ((more = read(fd, text + length, sizeof(text) - 1 - length)) > 0)
		length += more;
	close(fd);
	text[length] = 0;
	snprintf(start, sizeof(start), "%d:", irq);
	for (line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		while (*line == ' ')
			line++;
		if (strncmp(line, start, strlen(start)))
			continue;
		line += strlen(start);
		for (int at = 0; at <= cpu; at++)
			count = strtoul(line, &line, 10);
		return count;
	}
	fail("no interrupt %d in /proc/interrupts", irq);
}

static unsigned long moved, refused, followed;

/* Moves every interrupt of every disk to a CPU. */
static void move(int cpu)
{
	static unsigned long before[1024];
	char path[64], word[16];
	int seen[64], number = 0;

	snprintf(word, sizeof(word), "%d", cpu);
	for (int disk = 0; disk < disks; disk++)
		for (int irq = next_irq(disk, -1); irq >= 0; irq = next_irq(disk, irq)) {
			snprintf(path, sizeof(path), "/proc/irq/%d/smp_affinity_list", irq);
			before[irq] = arrived(irq, cpu);
			if (tell(path, word)) {
				moved++;
				seen[number++] = irq;
			} else {
				refused++;	/* the kernel has bound it to CPUs itself */
			}
		}
	progress("interrupts moved");
	for (int at = 0; at < number; at++)
		followed += arrived(seen[at], cpu) > before[seen[at]];
}

static volatile uint32_t *registers(int disk)
{
	char path[64], pci[13];
	void *mapped;
	int fd;

	pci_name(disk, pci);
	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/resource0", pci);
	fd = open(path, O_RDWR | O_SYNC);
	if (fd < 0)
		fail("open %s", path);
	mapped = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (mapped == MAP_FAILED)
		fail("mmap %s", path);
	close(fd);
	return mapped;
}

static void function_mask(int disk, int mask)
{
	char path[64], pci[13];
	uint8_t pointer, id;
	uint16_t control;
	int fd;

	pci_name(disk, pci);
	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/config", pci);
	fd = open(path, O_RDWR);
	if (fd < 0 || pread(fd, &pointer, 1, 0x34) != 1)
		fail("read %s", path);
	while (pread(fd, &id, 1, pointer) == 1 && id != 0x11)
		if (pread(fd, &pointer, 1, pointer + 1) != 1 || !pointer)
			fail("no MSI-X in %s", path);
	if (pread(fd, &control, 2, pointer + 2) != 2)
		fail("read %s", path);
	control = mask ? control | 0x4000 : control & ~0x4000;
	if (pwrite(fd, &control, 2, pointer + 2) != 2)
		fail("write %s", path);
	close(fd);
}

static void await_pending(int disk, volatile uint32_t *at)
{
	double deadline = now() + PATIENCE;

	while (!at[PENDING_BITS / 4]) {
		if (now() > deadline)
			fail("no pending bit on disk %d", disk);
		nap();
	}
}

static unsigned long masked;

/* Masks each disk until it has an interrupt pending, in both ways. */
static void mask(void)
{
	for (int disk = 0; disk < disks; disk++) {
		volatile uint32_t *at = registers(disk);
		int vectors = 0;

		function_mask(disk, 1);
		await_pending(disk, at);
		function_mask(disk, 0);
		masked++;
		progress("after the function mask");
		for (int irq = next_irq(disk, -1); irq >= 0; irq = next_irq(disk, irq))
			vectors++;
		for (int vector = 1; vector < vectors; vector++)
			at[TABLE / 4 + 4 * vector + 3] = 1;
		await_pending(disk, at);
		for (int vector = 1; vector < vectors; vector++)
			at[TABLE / 4 + 4 * vector + 3] = 0;
		masked++;
		progress("after the mask bits");
		munmap((void *)at, 0x10000);
	}
}

static void settle(int spread)
{
	double deadline = now() + PATIENCE;

	shared->settled = 0;
	shared->spread = spread;
	while (shared->settled < disks * WORKERS) {
		if (now() > deadline)
			fail("%d workers have moved", shared->settled);
		nap();
	}
}

static void offline(int cpu)
{
	char path[64];

	snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/online", cpu);
	settle(1);
	must_tell(path, "0");
	progress("a CPU off line");
	must_tell(path, "1");
	settle(0);
	progress("the CPU on line again");
}

/* Waits until a disk is there, or gone. */
static void await_disk(int disk, int there)
{
	char path[] = "/dev/vda";
	double deadline = now() + PATIENCE;

	path[7] += disk;
	while ((access(path, F_OK) == 0) != there) {
		if (now() > deadline)
			fail("%s is %s", path, there ? "missing" : "still there");
		nap();
	}
}

static void rebind(const char *driver, char names[][13])
{
	char path[64];

	snprintf(path, sizeof(path), "/sys/bus/%s/unbind", driver);
	for (int disk = 0; disk < disks; disk++)
		must_tell(path, names[disk]);
	for (int disk = 0; disk < disks; disk++)
		await_disk(disk, 0);
	snprintf(path, sizeof(path), "/sys/bus/%s/bind", driver);
	for (int disk = 0; disk < disks; disk++) {
		must_tell(path, names[disk]);
		await_disk(disk, 1);
	}
}

static void unbind(void)
{
	char names[MAX_DISKS][13];

	stop();
	for (int disk = 0; disk < disks; disk++)
		virtio_name(disk, names[disk]);
	rebind("virtio/drivers/virtio_blk", names);
	for (int disk = 0; disk < disks; disk++)
		pci_name(disk, names[disk]);
	rebind("pci/drivers/virtio-pci", names);
	start();
	progress("after binding");
}

/* Continues the CRC-32 of zlib over some bytes. */
static uint32_t crc32(uint32_t crc, const uint8_t *data, size_t length)
{
	static uint32_t table[256];

	for (uint32_t byte = 0; !table[255] && byte < 256; byte++) {
		uint32_t value = byte;

		for (int bit = 0; bit < 8; bit++)
			value = value >> 1 ^ (value & 1 ? 0xEDB88320 : 0);
		table[byte] = value;
	}
	for (crc = ~crc; length; length--)
		crc = table[(crc ^ *data++) & 0xFF] ^ crc >> 8;
	return ~crc;
}

static void verify(void)
{
	static uint64_t buffer[8 * BLOCK / 8] __attribute__((aligned(BLOCK)));

	for (int disk = 0; disk < disks; disk++) {
		int fd = open_disk(disk);
		uint32_t crc = 0;

		for (uint32_t first = 0; first < BLOCKS; first += 8) {
			if (pread(fd, buffer, sizeof(buffer), (off_t)first * BLOCK) != sizeof(buffer))
				fail("read disk %d, block %u", disk, first);
			crc = crc32(crc, (uint8_t *)buffer, sizeof(buffer));
			for (uint32_t at = 0; at < 8; at++)
				check(buffer + at * BLOCK / 8, disk, first + at,
				      shared->disks[disk].generations[first + at]);
		}
		printf("guest: crc32 %lu\n", (unsigned long)crc);
		close(fd);
	}
}

static void show_warnings(void)
{
	static char record[8192];
	int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
	ssize_t length;

	while ((length = read(fd, record, sizeof(record) - 1)) > 0) {
		char *text;

		record[length] = 0;
		text = strchr(record, ';');
		if (text && (atoi(record) & 7) <= 4)	/* warnings and worse */
			printf("kernel: %.*s\n", (int)strcspn(text + 1, "\n"), text + 1);
	}
	close(fd);
}

int main(void)
{
	unsigned long slowest = 0;
	int turns;

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	if (mount("proc", "/proc", "proc", 0, NULL) || mount("sys", "/sys", "sysfs", 0, NULL) ||
	    mount("dev", "/dev", "devtmpfs", 0, NULL))
		fail("mount");
	cpus = sysconf(_SC_NPROCESSORS_ONLN);
	for (char path[] = "/dev/vda"; disks < MAX_DISKS && !access(path, F_OK); path[7]++)
		disks++;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		fail("mmap");
	printf("guest: cpus %d\nguest: disks %d\n", cpus, disks);
	fflush(stdout);

	start();
	progress("at first");
	turns = rounds("moves");
	for (int turn = 0; turn < turns; turn++)
		move(turn % cpus);
	turns = rounds("masks");
	for (int turn = 0; turn < turns; turn++)
		mask();
	turns = cpus > 1 ? rounds("offline") : 0;
	for (int turn = 0; turn < turns; turn++)
		offline(1 + turn % (cpus - 1));
	turns = rounds("unbind");
	for (int turn = 0; turn < turns; turn++) {
		unbind();
		move(turn % cpus);
	}
	stop();
	verify();

	for (int disk = 0; disk < disks; disk++) {
		struct disk *one = &shared->disks[disk];

		printf("guest: reads %lu\nguest: writes %lu\nguest: flushes %lu\n", one->reads, one->writes, one->flushes);
		if (one->slowest_us > slowest)
			slowest = one->slowest_us;
	}
	printf("guest: slowest_ms %lu\nguest: moved %lu\nguest: followed %lu\nguest: refused %lu\nguest: masked %lu\n",
	       slowest / 1000, moved, followed, refused, masked);
	show_warnings();
	printf("guest: done\n");
	finish();
	return 0;
}
