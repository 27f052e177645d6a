"""A small virtual machine monitor: boots Linux on KVM, with virtio disks whose interrupts this package delivers.

    python -m examples.vmm --kernel bzImage --initrd initramfs --disk disk.img

| file | has |
|---|---|
| `machine.py` | the machine: start reading here |
| `virtio.py` | a virtio device on PCI: where MSI-X, doorbells and signals meet |
| `block.py`, `queue.py` | the disk's requests, and the queues that they come in |
| `pci.py`, `serial.py` | configuration space, and the console |
| `kvm.py` | the VM and its vCPUs, by bare ioctls |
| `boot.py` | Linux's boot protocol |
| `snapshot.py` | saves a stopped machine, and restores it in another process |
| `ledger.py` | counts the pushes of the routing table by their reasons |

It needs `/dev/kvm`, and nothing but this package and Python. The guest ends the machine by `reboot`.
"""
