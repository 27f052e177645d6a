"""A disk behind a virtual machine: qemu-storage-daemon serves it over vhost-user, and interrupts by a route's eventfd.

`python -m examples.vhost_user_blk` runs the example. A virtual machine monitor would take `front_end` and put a guest's
own driver in the place of `ring` and `disk`.
"""
