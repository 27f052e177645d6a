// SPDX-License-Identifier: GPL-2.0-only
/*
 * hvstub - stands in for the Microsoft hypervisor beneath the mshv root driver.
 *
 * Linked into a kernel beside the unmodified driver (drivers/hv/mshv_*.c), this file answers the driver's
 * hypercalls and emulates the registers that it reads, so that /dev/mshv comes up on a machine without a
 * Microsoft hypervisor. It keeps partitions, VPs, ports and deposited memory, records every interrupt that
 * the driver asks for, and lets tests inspect and interfere through /dev/hvstub. It runs no guest code.
 *
 * Kernel command line: hvstub.scheduler=N, the scheduler reported to the driver (enum hv_scheduler_type:
 * 1 LP, 2 LP with SMT, 3 core, 4 root).
 *
 * /dev/hvstub
 *   read   struct hvstub_interrupt records, oldest first; whole records only. Blocks unless O_NONBLOCK.
 *          When the buffer is full, records are dropped until the reader has taken every kept record and one
 *          EOVERFLOW, which marks the gap. There is no other gap between records.
 *   poll   readable when read would not block
 *   ioctl  HVSTUB_STATE     the stand-in's counts
 *          HVSTUB_FAIL      fail the nth hypercall of a kind, once; nth counts from this call; nth 0: no fault.
 *                           Closing the file that requested the fault cancels it.
 *          HVSTUB_FAULT     the last requested fault: how many such hypercalls have come since, and whether it struck
 *          HVSTUB_VECTORS   the vectors in a VP's register page; with .clear, read and cleared, as by a dispatch
 *          HVSTUB_WRITE     a guest's MMIO write: rings the doorbells that match, through the driver's interrupt
 *                           handler; they have rung when the call returns
 *   HVCALL_GET_PARTITION_PROPERTY of HVSTUB_PROPERTY_ID (MSHV_ROOT_HVCALL on a partition's descriptor) gives
 *   the partition's id, which the driver does not reveal.
 *
 * Memory. As with the real hypervisor, everything lives in deposited pages: objects and VP state pages
 * in the partition's own, partitions, ports and statistics pages in the root's. If there are too few, the
 * answer is HV_STATUS_INSUFFICIENT_MEMORY, and the driver deposits more. So nothing is allocated here, with
 * interrupts off or on, and an injected allocation failure is always the driver's. The root's pages are kept
 * for reuse, as the driver never asks for them back.
 */
#include <linux/cpuhotplug.h>
#include <linux/fs.h>
#include <linux/init.h>
#include <linux/irq_work.h>
#include <linux/kernel.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/static_call.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <linux/wait.h>
#include <asm/mshyperv.h>
#include <hyperv/hvhdk.h>
#include "mshv.h"
#include "mshv_root.h"

/* ---- interface to user space (host byte order) ---- */

struct hvstub_interrupt {
	u64 partition_id;
	u64 destination;	/* hv_input_assert_virtual_interrupt.dest_addr */
	u64 control;		/* union hv_interrupt_control: type in bits 0-31, level 32, logical 33 */
	u32 vector;
	u32 status;		/* the HV_STATUS answer, which the driver ignores */
};

struct hvstub_state {
	u64 scheduler;
	u64 hypercalls;		/* since boot */
	u64 partitions;		/* this and the next three: existing now, without the root's own */
	u64 vps;
	u64 ports;
	u64 connections;
	u64 mapped_pages;	/* VP state and statistics pages mapped now, including the root's own */
	u64 guest_pages;	/* deposited to existing partitions, and not withdrawn */
	u64 root_pages;		/* deposited to the root, in use or kept for reuse */
	u64 stranded_pages;	/* since boot: left behind in deleted partitions; counted in root_pages too */
	u64 recorded;		/* interrupts since boot */
	u64 lost;		/* of these, dropped because the buffer was full */
};

struct hvstub_fail {
	u16 code;		/* HVCALL_*; 0: of any kind */
	u16 status;		/* HV_STATUS_* */
	u32 nth;
};

struct hvstub_fault {
	struct hvstub_fail request;
	u64 seen;
	u64 injected;
};

struct hvstub_vectors {
	u64 partition_id;
	u32 vp_index;
	u32 clear;
	u64 vectors;		/* union hv_vp_register_page_interrupt_vectors: count, then up to 7 vectors */
};

struct hvstub_write {
	u64 partition_id;
	u64 gpa;
	u64 value;
	u32 size;
	u32 rung;		/* out: how many doorbells matched and reached the driver */
};

#define HVSTUB_STATE	_IOR('h', 0, struct hvstub_state)
#define HVSTUB_FAIL	_IOW('h', 1, struct hvstub_fail)
#define HVSTUB_FAULT	_IOR('h', 2, struct hvstub_fault)
#define HVSTUB_VECTORS	_IOWR('h', 3, struct hvstub_vectors)
#define HVSTUB_WRITE	_IOWR('h', 4, struct hvstub_write)

#define HVSTUB_PROPERTY_ID	0x68760001

/* ---- state; each object fills one deposited page ---- */

#define ROOT_ID		1
#define RECORDS		(1u << 17)
#define PROPERTIES	64

enum partition_state { CREATED, INITIALIZED, FINALIZED };

struct hv_memory {
	struct list_head pages;		/* free ones, by page->lru */
	u64 total;			/* deposited and not withdrawn, free or not */
};

struct vp {
	struct page *state[HV_VP_STATE_PAGE_COUNT];
	struct page *stats[HV_STATS_AREA_COUNT];
};

struct partition {
	struct list_head link;
	u64 id;
	enum partition_state state;
	struct hv_memory memory;
	struct page *stats[HV_STATS_AREA_COUNT];
	struct { u32 code; u64 value; } properties[PROPERTIES];
	struct vp *vps[MSHV_MAX_VPS];
};
static_assert(sizeof(struct partition) <= HV_HYP_PAGE_SIZE);

struct port {
	struct list_head link;
	u32 id;
	u64 partition_id;		/* that may connect */
	bool connected;
	u32 connection_id;
	struct hv_connection_info connection;
};

struct synic {				/* one CPU's synthetic interrupt controller */
	u64 simp, siefp, sirbp, scontrol, sint[HV_SYNIC_SINT_COUNT];
	struct hv_message_page *messages;
	struct hv_synic_event_ring_page *rings;
	u8 head;			/* next slot of the doorbell ring */
};

/* Protects all below. Raw, taken with interrupts off: signalling an irqfd comes here with a wait queue's lock held. */
static DEFINE_RAW_SPINLOCK(lock);
static LIST_HEAD(partitions);
static LIST_HEAD(ports);
static u64 last_id = ROOT_ID;
static struct vp root_vps[NR_CPUS];
static struct partition root = {
	.id = ROOT_ID, .state = INITIALIZED, .memory.pages = LIST_HEAD_INIT(root.memory.pages),
};
static struct page *hypervisor_stats[HV_STATS_AREA_COUNT], *lp_stats[NR_CPUS][HV_STATS_AREA_COUNT];
static struct hvstub_state state = { .scheduler = HV_SCHEDULER_TYPE_CORE_SMT };
static struct hvstub_fault fault;
static struct file *fault_owner;

static struct hvstub_interrupt *records;
static u64 records_head, records_tail;	/* written, taken: never wrap */
static bool records_lost;		/* dropping until the reader has had EOVERFLOW */

static DEFINE_PER_CPU(struct synic, synics);
static DEFINE_MUTEX(reader);		/* one reader at a time: records stay in the buffer while they are copied */
static DEFINE_MUTEX(ringer);		/* one MMIO write at a time */
static DECLARE_WAIT_QUEUE_HEAD(readable);

static void wake_readers(struct irq_work *work)
{
	wake_up_interruptible(&readable);
}
static DEFINE_IRQ_WORK(wake_work, wake_readers);

static void interrupt_driver(struct irq_work *work)
{
	mshv_isr();
}
static DEFINE_IRQ_WORK(interrupt_work, interrupt_driver);

/* ---- deposited memory ---- */

static struct page *take_page(struct partition *from)
{
	struct page *page = list_first_entry_or_null(&from->memory.pages, struct page, lru);

	if (page) {
		list_del(&page->lru);
		clear_page(page_address(page));
	}
	return page;
}

static void give_page(struct partition *to, struct page *page)
{
	list_add(&page->lru, &to->memory.pages);
}

static void *take_object(struct partition *from)
{
	struct page *page = take_page(from);

	return page ? page_address(page) : NULL;
}

static void give_object(struct partition *to, void *object)
{
	give_page(to, virt_to_page(object));
}

static u64 map_page(struct partition *from, struct page **slot, u64 *pfn)
{
	if (*slot)
		return HV_STATUS_OPERATION_DENIED;
	*slot = take_page(from);
	if (!*slot)
		return from == &root ? HV_STATUS_INSUFFICIENT_ROOT_MEMORY : HV_STATUS_INSUFFICIENT_MEMORY;
	*pfn = page_to_pfn(*slot);
	state.mapped_pages++;
	return HV_STATUS_SUCCESS;
}

static u64 unmap_page(struct partition *to, struct page **slot)
{
	if (!*slot)
		return HV_STATUS_INVALID_PARAMETER;
	give_page(to, *slot);
	*slot = NULL;
	state.mapped_pages--;
	return HV_STATUS_SUCCESS;
}

static struct partition *find_partition(u64 id)
{
	struct partition *p;

	if (id == ROOT_ID || id == HV_PARTITION_ID_SELF)
		return &root;
	list_for_each_entry(p, &partitions, link)
		if (p->id == id)
			return p;
	return NULL;
}

static u64 deposit(const struct hv_deposit_memory *in, unsigned int first, unsigned int count)
{
	struct partition *p = find_partition(in->partition_id);
	unsigned int i;

	if (!p)
		return HV_STATUS_INVALID_PARTITION_ID;
	for (i = first; i < count; i++)
		if (!pfn_valid(in->gpa_page_list[i]))
			return HV_STATUS_INVALID_PARAMETER;
	for (i = first; i < count; i++)
		give_page(p, pfn_to_page(in->gpa_page_list[i]));
	p->memory.total += count - first;
	*(p == &root ? &state.root_pages : &state.guest_pages) += count - first;
	return (u64)count << HV_HYPERCALL_REP_COMP_OFFSET;
}

static u64 withdraw(const struct hv_input_withdraw_memory *in, struct hv_output_withdraw_memory *out,
		    unsigned int first, unsigned int count)
{
	struct partition *p = find_partition(in->partition_id);
	u64 status = HV_STATUS_SUCCESS;
	unsigned int i;

	if (!p)
		return HV_STATUS_INVALID_PARTITION_ID;
	for (i = first; i < count; i++) {
		struct page *page = list_first_entry_or_null(&p->memory.pages, struct page, lru);

		if (!page) {
			status = HV_STATUS_NO_RESOURCES;
			break;
		}
		list_del(&page->lru);
		out->gpa_page_list[i] = page_to_pfn(page);
	}
	p->memory.total -= i - first;
	*(p == &root ? &state.root_pages : &state.guest_pages) -= i - first;
	return status | (u64)i << HV_HYPERCALL_REP_COMP_OFFSET;
}

/* ---- partitions and VPs ---- */

static u64 create_partition(struct hv_output_create_partition *out)
{
	struct partition *p = take_object(&root);

	if (!p)
		return HV_STATUS_INSUFFICIENT_ROOT_MEMORY;
	p->id = ++last_id;
	INIT_LIST_HEAD(&p->memory.pages);
	list_add(&p->link, &partitions);
	state.partitions++;
	out->partition_id = p->id;
	return HV_STATUS_SUCCESS;
}

static u64 initialize_partition(u64 id)
{
	struct partition *p = find_partition(id);

	if (!p)
		return HV_STATUS_INVALID_PARTITION_ID;
	if (p->state != CREATED)
		return HV_STATUS_INVALID_PARTITION_STATE;
	p->state = INITIALIZED;
	return HV_STATUS_SUCCESS;
}

static void delete_vp(struct partition *p, u32 index)
{
	struct vp *vp = p->vps[index];
	int i;

	for (i = 0; i < HV_VP_STATE_PAGE_COUNT; i++)
		unmap_page(p, &vp->state[i]);
	for (i = 0; i < HV_STATS_AREA_COUNT; i++)
		unmap_page(&root, &vp->stats[i]);
	give_object(p, vp);
	p->vps[index] = NULL;
	state.vps--;
}

static void disconnect(struct port *port)
{
	port->connected = false;
	state.connections--;
}

static u64 finalize_partition(u64 id)
{
	struct partition *p = find_partition(id);
	struct port *port;
	u32 i;

	if (!p)
		return HV_STATUS_INVALID_PARTITION_ID;
	if (p == &root || p->state != INITIALIZED)
		return HV_STATUS_INVALID_PARTITION_STATE;
	for (i = 0; i < MSHV_MAX_VPS; i++)
		if (p->vps[i])
			delete_vp(p, i);
	for (i = 0; i < HV_STATS_AREA_COUNT; i++)
		unmap_page(&root, &p->stats[i]);
	list_for_each_entry(port, &ports, link)
		if (port->connected && port->partition_id == id)
			disconnect(port);
	p->state = FINALIZED;
	return HV_STATUS_SUCCESS;
}

static u64 delete_partition(u64 id)
{
	struct partition *p = find_partition(id);

	if (!p)
		return HV_STATUS_INVALID_PARTITION_ID;
	if (p->state == INITIALIZED)
		return HV_STATUS_INVALID_PARTITION_STATE;
	list_del(&p->link);
	list_splice_init(&p->memory.pages, &root.memory.pages);
	root.memory.total += p->memory.total;
	state.root_pages += p->memory.total;
	state.guest_pages -= p->memory.total;
	state.stranded_pages += p->memory.total;
	give_object(&root, p);
	state.partitions--;
	return HV_STATUS_SUCCESS;
}

static u64 create_vp(const struct hv_create_vp *in)
{
	struct partition *p = find_partition(in->partition_id);

	if (!p)
		return HV_STATUS_INVALID_PARTITION_ID;
	if (p->state != INITIALIZED)
		return HV_STATUS_INVALID_PARTITION_STATE;
	if (in->vp_index >= MSHV_MAX_VPS || p->vps[in->vp_index])
		return HV_STATUS_INVALID_VP_INDEX;
	p->vps[in->vp_index] = take_object(p);
	if (!p->vps[in->vp_index])
		return HV_STATUS_INSUFFICIENT_MEMORY;
	state.vps++;
	return HV_STATUS_SUCCESS;
}

static u64 find_vp(u64 id, u32 index, struct partition **partition, struct vp **vp)
{
	*partition = find_partition(id);
	if (!*partition)
		return HV_STATUS_INVALID_PARTITION_ID;
	*vp = index < MSHV_MAX_VPS ? (*partition)->vps[index] : NULL;
	return *vp ? HV_STATUS_SUCCESS : HV_STATUS_INVALID_VP_INDEX;
}

static u64 delete_vp_call(u64 first, u64 second)
{
	union hv_input_delete_vp in = { .as_uint64 = { first, second } };
	struct partition *p;
	struct vp *vp;
	u64 status = find_vp(in.partition_id, in.vp_index, &p, &vp);

	if (status == HV_STATUS_SUCCESS && p == &root)
		status = HV_STATUS_ACCESS_DENIED;
	if (status == HV_STATUS_SUCCESS)
		delete_vp(p, in.vp_index);
	return status;
}

/* ---- pages that the hypervisor shares with the driver ---- */

static u64 vp_state_page(u64 id, u32 index, u16 type, struct hv_output_map_vp_state_page *out)
{
	struct partition *p;
	struct vp *vp;
	u64 pfn, status = find_vp(id, index, &p, &vp);

	if (status)
		return status;
	if (type >= HV_VP_STATE_PAGE_COUNT)
		return HV_STATUS_INVALID_PARAMETER;
	if (!out)
		return unmap_page(p, &vp->state[type]);
	status = map_page(p, &vp->state[type], &pfn);
	if (!status)
		out->map_location = pfn;
	return status;
}

static u64 stats_page(u32 type, const union hv_stats_object_identity *identity, struct hv_output_map_stats_page *out)
{
	u8 area = identity->hv.stats_area_type;	/* in the same byte for every kind of object */
	struct partition *p;
	struct page **slots;
	struct vp *vp;
	u64 pfn, status;

	switch (type) {
	case HV_STATS_OBJECT_HYPERVISOR:
		slots = hypervisor_stats;
		break;
	case HV_STATS_OBJECT_LOGICAL_PROCESSOR:
		if (identity->lp.lp_index >= nr_cpu_ids)
			return HV_STATUS_INVALID_LP_INDEX;
		slots = lp_stats[identity->lp.lp_index];
		break;
	case HV_STATS_OBJECT_PARTITION:
		p = find_partition(identity->partition.partition_id);
		if (!p)
			return HV_STATUS_INVALID_PARTITION_ID;
		slots = p->stats;
		break;
	case HV_STATS_OBJECT_VP:
		status = find_vp(identity->vp.partition_id, identity->vp.vp_index, &p, &vp);
		if (status)
			return status;
		slots = vp->stats;
		break;
	default:
		return HV_STATUS_INVALID_PARAMETER;
	}
	if (area >= HV_STATS_AREA_COUNT)
		return HV_STATUS_INVALID_PARAMETER;
	if (!out)
		return unmap_page(&root, &slots[area]);
	status = map_page(&root, &slots[area], &pfn);
	if (!status)
		out->map_location = pfn;
	return status;
}

/* ---- doorbells ---- */

static struct port *find_port(u32 id)
{
	struct port *port;

	list_for_each_entry(port, &ports, link)
		if (port->id == id)
			return port;
	return NULL;
}

static u64 create_port(const struct hv_input_create_port *in)
{
	struct port *port;

	if (find_partition(in->port_partition_id) != &root || !find_partition(in->connection_partition_id))
		return HV_STATUS_INVALID_PARTITION_ID;
	if (in->port_info.port_type != HV_PORT_TYPE_DOORBELL)
		return HV_STATUS_INVALID_PARAMETER;
	if (find_port(in->port_id.u.id))
		return HV_STATUS_INVALID_PORT_ID;
	port = take_object(&root);
	if (!port)
		return HV_STATUS_INSUFFICIENT_ROOT_MEMORY;
	port->id = in->port_id.u.id;
	port->partition_id = in->connection_partition_id;
	list_add(&port->link, &ports);
	state.ports++;
	return HV_STATUS_SUCCESS;
}

static u64 delete_port(u64 first, u64 second)
{
	union hv_input_delete_port in = { .as_uint64 = { first, second } };
	struct port *port = find_port(in.port_id.u.id);

	if (find_partition(in.port_partition_id) != &root)
		return HV_STATUS_INVALID_PARTITION_ID;
	if (!port)
		return HV_STATUS_INVALID_PORT_ID;
	if (port->connected)
		disconnect(port);
	list_del(&port->link);
	give_object(&root, port);
	state.ports--;
	return HV_STATUS_SUCCESS;
}

static u64 connect_port(const struct hv_input_connect_port *in)
{
	struct port *port = find_port(in->port_id.u.id);

	if (!find_partition(in->connection_partition_id) || find_partition(in->port_partition_id) != &root)
		return HV_STATUS_INVALID_PARTITION_ID;
	if (!port || port->partition_id != in->connection_partition_id)
		return HV_STATUS_INVALID_PORT_ID;
	if (port->connected)
		return HV_STATUS_INVALID_CONNECTION_ID;
	port->connection_id = in->connection_id.u.id;
	port->connection = in->connection_info;
	port->connected = true;
	state.connections++;
	return HV_STATUS_SUCCESS;
}

static u64 disconnect_port(u64 first, u64 second)
{
	union hv_input_disconnect_port in = { .as_uint64 = { first, second } };
	struct port *port;

	if (!find_partition(in.connection_partition_id))
		return HV_STATUS_INVALID_PARTITION_ID;
	list_for_each_entry(port, &ports, link)
		if (port->connected && port->partition_id == in.connection_partition_id &&
		    port->connection_id == in.connection_id.u.id) {
			disconnect(port);
			return HV_STATUS_SUCCESS;
		}
	return HV_STATUS_INVALID_CONNECTION_ID;
}

static bool matches(const struct port *port, const struct hvstub_write *write)
{
	u64 flags = port->connection.doorbell_connection_info.flags;
	u64 size = flags & HV_DOORBELL_FLAG_TRIGGER_SIZE_MASK;

	return port->connected && port->partition_id == write->partition_id &&
	       port->connection.doorbell_connection_info.gpa == write->gpa &&
	       (size == HV_DOORBELL_FLAG_TRIGGER_SIZE_ANY || 1u << (size - 1) == write->size) &&
	       (flags & HV_DOORBELL_FLAG_TRIGGER_ANY_VALUE ||
		port->connection.doorbell_connection_info.trigger_value == write->value);
}

/* Puts the ports that a write rings on this CPU's event ring, as the hypervisor does, and interrupts the driver. */
static int ring_doorbells(struct hvstub_write *write)
{
	struct hv_notification_message_payload *payload;
	struct hv_synic_event_ring *ring;
	struct hv_message *message;
	u8 slots[HV_SYNIC_EVENT_RING_MESSAGE_COUNT];
	struct synic *synic;
	struct port *port;
	unsigned long flags;
	unsigned int i, n = 0;
	bool full = false;

	migrate_disable();
	raw_spin_lock_irqsave(&lock, flags);
	synic = this_cpu_ptr(&synics);
	ring = &synic->rings->sint_event_ring[HV_SYNIC_DOORBELL_SINT_INDEX];
	list_for_each_entry(port, &ports, link) {
		if (!matches(port, write))
			continue;
		if (n == ARRAY_SIZE(slots) || ring->data[synic->head]) {
			full = true;
			break;
		}
		WRITE_ONCE(ring->data[synic->head], port->id);
		slots[n++] = synic->head;
		synic->head = (synic->head + 1) % HV_SYNIC_EVENT_RING_MESSAGE_COUNT;
	}
	if (n) {
		message = &synic->messages->sint_message[HV_SYNIC_INTERCEPTION_SINT_INDEX];
		payload = (struct hv_notification_message_payload *)message->u.payload;
		payload->sint_index = HV_SYNIC_DOORBELL_SINT_INDEX;
		message->header.payload_size = sizeof(*payload);
		smp_store_release(&message->header.message_type, HVMSG_SYNIC_SINT_INTERCEPT);
		irq_work_queue(&interrupt_work);
	}
	raw_spin_unlock_irqrestore(&lock, flags);
	irq_work_sync(&interrupt_work);
	for (i = 0; i < n; i++)
		write->rung += !READ_ONCE(ring->data[slots[i]]);
	migrate_enable();
	return full || write->rung != n ? -EIO : 0;
}

/* ---- properties: a property reads back as it was set, otherwise as 0 ---- */

static u64 get_property(u64 id, u32 code, u64 *value)
{
	struct partition *p = find_partition(id);
	int i;

	if (!p)
		return HV_STATUS_INVALID_PARTITION_ID;
	*value = code == HVSTUB_PROPERTY_ID ? p->id : 0;
	for (i = 0; i < PROPERTIES; i++)
		if (p->properties[i].code == code)
			*value = p->properties[i].value;
	return HV_STATUS_SUCCESS;
}

static u64 set_property(const struct hv_input_set_partition_property *in)
{
	struct partition *p = find_partition(in->partition_id);
	int i;

	if (!p)
		return HV_STATUS_INVALID_PARTITION_ID;
	if (in->property_code == HV_PARTITION_PROPERTY_PRIVILEGE_FLAGS && p->state != CREATED)
		return HV_STATUS_INVALID_PARTITION_STATE;
	for (i = 0; i < PROPERTIES; i++)
		if (!p->properties[i].code || p->properties[i].code == in->property_code) {
			p->properties[i].code = in->property_code;
			p->properties[i].value = in->property_value;
			return HV_STATUS_SUCCESS;
		}
	return HV_STATUS_UNKNOWN_PROPERTY;
}

/* ---- interrupts ---- */

static void record_interrupt(const struct hv_input_assert_virtual_interrupt *in, u64 status)
{
	state.recorded++;
	if (records_lost || records_head - records_tail == RECORDS) {
		records_lost = true;
		state.lost++;
	} else {
		records[records_head++ % RECORDS] = (struct hvstub_interrupt) {
			.partition_id = in->partition_id,
			.destination = in->dest_addr,
			.control = in->control.as_uint64,
			.vector = in->vector,
			.status = status,
		};
	}
	irq_work_queue(&wake_work);
}

/* ---- hypercalls ---- */

static bool strikes(u16 code)
{
	if (!fault.request.nth || fault.injected || (fault.request.code && fault.request.code != code))
		return false;
	fault.seen++;
	fault.injected = fault.seen == fault.request.nth;
	return fault.injected;
}

static u64 answer(u16 code, void *in, void *out, u64 first, u64 second, unsigned int start, unsigned int reps)
{
	const u64 done = (u64)reps << HV_HYPERCALL_REP_COMP_OFFSET;
	struct hv_input_get_partition_property *property = in;
	struct hv_input_map_vp_state_page *vp_page = in;
	struct hv_input_unmap_vp_state_page *vp_unmap = in;
	struct hv_input_map_stats_page *stats = in;
	struct partition *p;
	struct vp *vp;
	u64 status;

	switch (code) {
	case HVCALL_CREATE_PARTITION:
		return create_partition(out);
	case HVCALL_INITIALIZE_PARTITION:
		return initialize_partition(first);
	case HVCALL_FINALIZE_PARTITION:
		return finalize_partition(first);
	case HVCALL_DELETE_PARTITION:
		return delete_partition(first);
	case HVCALL_DEPOSIT_MEMORY:
		return deposit(in, start, reps);
	case HVCALL_WITHDRAW_MEMORY:
		return withdraw(in, out, start, reps);
	case HVCALL_CREATE_VP:
		return create_vp(in);
	case HVCALL_DELETE_VP:
		return delete_vp_call(first, second);
	case HVCALL_MAP_VP_STATE_PAGE:
		return vp_state_page(vp_page->partition_id, vp_page->vp_index, vp_page->type, out);
	case HVCALL_UNMAP_VP_STATE_PAGE:
		return vp_state_page(vp_unmap->partition_id, vp_unmap->vp_index, vp_unmap->type, NULL);
	case HVCALL_MAP_STATS_PAGE:
		return stats_page(stats->type, &stats->identity, out);
	case HVCALL_UNMAP_STATS_PAGE:
		return stats_page(stats->type, &stats->identity, NULL);
	case HVCALL_CREATE_PORT:
		return create_port(in);
	case HVCALL_DELETE_PORT:
		return delete_port(first, second);
	case HVCALL_CONNECT_PORT:
		return connect_port(in);
	case HVCALL_DISCONNECT_PORT:
		return disconnect_port(first, second);
	case HVCALL_GET_PARTITION_ID:
		*(u64 *)out = ROOT_ID;
		return HV_STATUS_SUCCESS;
	case HVCALL_GET_SYSTEM_PROPERTY:
		memset(out, 0, sizeof(struct hv_output_get_system_property));
		((struct hv_output_get_system_property *)out)->scheduler_type = state.scheduler;
		return HV_STATUS_SUCCESS;
	case HVCALL_GET_PARTITION_PROPERTY:
		return get_property(property->partition_id, property->property_code, out);
	case HVCALL_GET_PARTITION_PROPERTY_EX:
		memset(out, 0, sizeof(struct hv_output_get_partition_property_ex));
		return get_property(property->partition_id, property->property_code, out);
	case HVCALL_SET_PARTITION_PROPERTY:
		return set_property(in);
	case HVCALL_GET_VP_REGISTERS:
		status = find_vp(*(u64 *)in, ((struct hv_input_get_vp_registers *)in)->vp_index, &p, &vp);
		if (!status)
			memset((union hv_register_value *)out + start, 0,
			       (reps - start) * sizeof(union hv_register_value));
		return status ?: done;
	case HVCALL_SET_VP_REGISTERS:
		return find_vp(*(u64 *)in, ((struct hv_input_set_vp_registers *)in)->vp_index, &p, &vp) ?: done;
	case HVCALL_GET_VP_STATE:	/* the pages to fill arrive zeroed, and zeros are the state of every VP here */
		status = find_vp(*(u64 *)in, ((struct hv_input_get_vp_state *)in)->vp_index, &p, &vp);
		if (!status)
			memset(out, 0, sizeof(union hv_output_get_vp_state));
		return status;
	case HVCALL_SET_VP_STATE:
		return find_vp(*(u64 *)in, ((struct hv_input_set_vp_state *)in)->vp_index, &p, &vp);
	case HVCALL_DISPATCH_VP:	/* there is no guest code to run */
		status = find_vp(*(u64 *)in, ((struct hv_input_dispatch_vp *)in)->vp_index, &p, &vp);
		return status ?: HV_STATUS_INVALID_VP_STATE;
	case HVCALL_ASSERT_VIRTUAL_INTERRUPT:
		return find_partition(*(u64 *)in) ? HV_STATUS_SUCCESS : HV_STATUS_INVALID_PARTITION_ID;
	case HVCALL_CLEAR_VIRTUAL_INTERRUPT:
		return find_partition(first) ? HV_STATUS_SUCCESS : HV_STATUS_INVALID_PARTITION_ID;
	case HVCALL_NOTIFY_PORT_RING_EMPTY:
		return HV_STATUS_SUCCESS;
	/* Guest memory and interception: without effect, as no guest code runs. */
	case HVCALL_MAP_GPA_PAGES:
	case HVCALL_UNMAP_GPA_PAGES:
	case HVCALL_GET_GPA_PAGES_ACCESS_STATES:
	case HVCALL_INSTALL_INTERCEPT:
	case HVCALL_REGISTER_INTERCEPT_RESULT:
		if (!find_partition(*(u64 *)in))
			return HV_STATUS_INVALID_PARTITION_ID;
		if (out)
			memset(out, 0, HV_HYP_PAGE_SIZE);
		return done;
	case HVCALL_ACQUIRE_SPARSE_SPA_PAGE_HOST_ACCESS:
	case HVCALL_RELEASE_SPARSE_SPA_PAGE_HOST_ACCESS:
		return done;
	default:
		pr_info_ratelimited("hvstub: unknown hypercall %#06x\n", code);
		return HV_STATUS_INVALID_HYPERCALL_CODE;
	}
}

static u64 hypercall(u64 control, u64 first, u64 second)
{
	bool fast = control & HV_HYPERCALL_FAST_BIT;
	void *in = !fast && first ? phys_to_virt(first) : NULL;
	void *out = !fast && second ? phys_to_virt(second) : NULL;
	unsigned int reps = (control & HV_HYPERCALL_REP_COMP_MASK) >> HV_HYPERCALL_REP_COMP_OFFSET;
	unsigned int start = (control & HV_HYPERCALL_REP_START_MASK) >> HV_HYPERCALL_REP_START_OFFSET;
	u16 code = control & HV_HYPERCALL_RESULT_MASK;
	unsigned long flags;
	u64 status;

	raw_spin_lock_irqsave(&lock, flags);
	state.hypercalls++;
	if (strikes(code))
		status = fault.request.status;
	else
		status = answer(code, in, out, first, second, start, reps);
	if (code == HVCALL_ASSERT_VIRTUAL_INTERRUPT)
		record_interrupt(in, status);
	raw_spin_unlock_irqrestore(&lock, flags);
	return status;
}

/* ---- registers: these replace the kernel's own accessors, which lab/build marks weak ---- */

u64 hv_get_non_nested_msr(unsigned int reg)
{
	struct synic *synic = this_cpu_ptr(&synics);

	switch (reg) {
	case HV_X64_MSR_VP_INDEX:
		return smp_processor_id();
	case HV_X64_MSR_SIMP:
		return synic->simp;
	case HV_X64_MSR_SIEFP:
		return synic->siefp;
	case HV_X64_MSR_SIRBP:
		return synic->sirbp;
	case HV_X64_MSR_SCONTROL:
		return synic->scontrol;
	case HV_X64_MSR_SINT0 ... HV_X64_MSR_SINT15:
		return synic->sint[reg - HV_X64_MSR_SINT0];
	default:
		return 0;
	}
}

void hv_set_non_nested_msr(unsigned int reg, u64 value)
{
	struct synic *synic = this_cpu_ptr(&synics);

	switch (reg) {
	case HV_X64_MSR_SIMP:
		synic->simp = value;
		break;
	case HV_X64_MSR_SIEFP:
		synic->siefp = value;
		break;
	case HV_X64_MSR_SIRBP:
		synic->sirbp = value;
		break;
	case HV_X64_MSR_SCONTROL:
		synic->scontrol = value;
		break;
	case HV_X64_MSR_SINT0 ... HV_X64_MSR_SINT15:
		synic->sint[reg - HV_X64_MSR_SINT0] = value;
		break;
	}
}

int hv_get_hypervisor_version(union hv_hypervisor_version_info *info)
{
	*info = (union hv_hypervisor_version_info) { .build_number = MSHV_HV_MIN_VERSION };
	return 0;
}

/* ---- /dev/hvstub ---- */

static bool has_news(void)
{
	return READ_ONCE(records_head) != READ_ONCE(records_tail) || READ_ONCE(records_lost);
}

static ssize_t hvstub_read(struct file *file, char __user *buf, size_t size, loff_t *pos)
{
	const size_t record = sizeof(*records);
	size_t wanted = size / record, done = 0, n, at;
	unsigned long flags;
	ssize_t ret;

	if (!wanted)
		return -EINVAL;
	for (;;) {
		if (!(file->f_flags & O_NONBLOCK)) {
			ret = wait_event_interruptible(readable, has_news());
			if (ret)
				return ret;
		}
		ret = mutex_lock_interruptible(&reader);
		if (ret)
			return ret;
		while (done < wanted) {
			raw_spin_lock_irqsave(&lock, flags);
			at = records_tail % RECORDS;
			n = min3((u64)(wanted - done), records_head - records_tail, (u64)(RECORDS - at));
			if (!n && !done && records_lost) {
				records_lost = false;
				ret = -EOVERFLOW;
			}
			raw_spin_unlock_irqrestore(&lock, flags);
			if (!n)
				break;
			if (copy_to_user(buf + done * record, records + at, n * record)) {
				ret = -EFAULT;
				break;
			}
			raw_spin_lock_irqsave(&lock, flags);
			records_tail += n;
			raw_spin_unlock_irqrestore(&lock, flags);
			done += n;
		}
		mutex_unlock(&reader);
		if (done)
			return done * record;
		if (ret)
			return ret;
		if (file->f_flags & O_NONBLOCK)
			return -EAGAIN;
	}
}

static __poll_t hvstub_poll(struct file *file, poll_table *table)
{
	poll_wait(file, &readable, table);
	return has_news() ? EPOLLIN | EPOLLRDNORM : 0;
}

static int read_vectors(struct hvstub_vectors *arg)
{
	struct hv_vp_register_page *registers;
	struct partition *p;
	unsigned long flags;
	struct vp *vp;
	int ret = -ENOENT;

	raw_spin_lock_irqsave(&lock, flags);
	if (!find_vp(arg->partition_id, arg->vp_index, &p, &vp) && vp->state[HV_VP_STATE_PAGE_REGISTERS]) {
		registers = page_address(vp->state[HV_VP_STATE_PAGE_REGISTERS]);
		if (arg->clear)
			arg->vectors = xchg(&registers->interrupt_vectors.as_uint64, 0);
		else
			arg->vectors = READ_ONCE(registers->interrupt_vectors.as_uint64);
		ret = 0;
	}
	raw_spin_unlock_irqrestore(&lock, flags);
	return ret;
}

static long hvstub_ioctl(struct file *file, unsigned int request, unsigned long pointer)
{
	void __user *user = (void __user *)pointer;
	union {
		struct hvstub_state state;
		struct hvstub_fail fail;
		struct hvstub_fault fault;
		struct hvstub_vectors vectors;
		struct hvstub_write write;
	} arg;
	unsigned long flags;
	long ret = 0;

	if (_IOC_SIZE(request) > sizeof(arg))
		return -ENOTTY;
	memset(&arg, 0, sizeof(arg));
	if (_IOC_DIR(request) & _IOC_WRITE && copy_from_user(&arg, user, _IOC_SIZE(request)))
		return -EFAULT;
	switch (request) {
	case HVSTUB_STATE:
		raw_spin_lock_irqsave(&lock, flags);
		arg.state = state;
		raw_spin_unlock_irqrestore(&lock, flags);
		break;
	case HVSTUB_FAIL:
		if (!arg.fail.status && arg.fail.nth)
			return -EINVAL;
		raw_spin_lock_irqsave(&lock, flags);
		fault = (struct hvstub_fault) { .request = arg.fail };
		fault_owner = file;
		raw_spin_unlock_irqrestore(&lock, flags);
		break;
	case HVSTUB_FAULT:
		raw_spin_lock_irqsave(&lock, flags);
		arg.fault = fault;
		raw_spin_unlock_irqrestore(&lock, flags);
		break;
	case HVSTUB_VECTORS:
		ret = read_vectors(&arg.vectors);
		break;
	case HVSTUB_WRITE:
		if (arg.write.rung)
			return -EINVAL;
		mutex_lock(&ringer);
		ret = ring_doorbells(&arg.write);
		mutex_unlock(&ringer);
		break;
	default:
		return -ENOTTY;
	}
	if (!ret && _IOC_DIR(request) & _IOC_READ && copy_to_user(user, &arg, _IOC_SIZE(request)))
		ret = -EFAULT;
	return ret;
}

static int hvstub_release(struct inode *inode, struct file *file)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&lock, flags);
	if (fault_owner == file) {
		fault = (struct hvstub_fault) {};
		fault_owner = NULL;
	}
	raw_spin_unlock_irqrestore(&lock, flags);
	return 0;
}

static const struct file_operations hvstub_fops = {
	.owner = THIS_MODULE,
	.read = hvstub_read,
	.poll = hvstub_poll,
	.unlocked_ioctl = hvstub_ioctl,
	.release = hvstub_release,
};

static struct miscdevice hvstub_device = {
	.minor = MISC_DYNAMIC_MINOR, .name = "hvstub", .fops = &hvstub_fops, .mode = 0600,
};

/* ---- boot ---- */

static int __init set_scheduler(char *value)
{
	return !kstrtou64(value, 0, &state.scheduler);
}
__setup("hvstub.scheduler=", set_scheduler);

static int __init allocate_synic(struct synic *synic)
{
	void *pages = (void *)__get_free_pages(GFP_KERNEL | __GFP_ZERO, 2);	/* three are used */

	if (!pages)
		return -ENOMEM;
	synic->messages = pages;
	synic->rings = pages + HV_HYP_PAGE_SIZE;
	synic->simp = virt_to_phys(synic->messages);
	synic->sirbp = virt_to_phys(synic->rings);
	synic->siefp = virt_to_phys(pages + 2 * HV_HYP_PAGE_SIZE);
	BUILD_BUG_ON(sizeof(*synic->messages) > HV_HYP_PAGE_SIZE || sizeof(*synic->rings) > HV_HYP_PAGE_SIZE);
	return 0;
}

/* Replaces hyperv_init(), as the kernel finds no hypervisor; runs before the driver's device_initcall. */
static int __init hvstub_init(void)
{
	int cpu, ret;

	records = vzalloc(array_size(RECORDS, sizeof(*records)));
	if (!records)
		return -ENOMEM;
	for_each_possible_cpu(cpu) {
		root.vps[cpu] = &root_vps[cpu];
		ret = allocate_synic(per_cpu_ptr(&synics, cpu));
		if (ret)
			return ret;
	}
	hv_curr_partition_type = HV_PARTITION_TYPE_ROOT;
	if (state.scheduler == HV_SCHEDULER_TYPE_ROOT)
		ms_hyperv.ext_features |= HV_VP_DISPATCH_INTERRUPT_INJECTION_AVAILABLE;
	static_call_update(hv_hypercall, hypercall);
	ret = hv_common_init();
	if (ret)
		return ret;
	ret = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "hvstub", hv_common_cpu_init, NULL);
	if (ret < 0)
		return ret;
	hv_get_partition_id();
	return 0;
}
subsys_initcall(hvstub_init);

static int __init hvstub_register(void)
{
	return misc_register(&hvstub_device);
}
device_initcall(hvstub_register);
