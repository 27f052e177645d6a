# A guest that counts: it takes every interrupt, counts it by vector, and ends it at its local APIC. Between interrupts it
# halts, or makes the one access to memory or a port that it is told to make.
#
# Real mode, with a data segment of 4 GiB. In protected mode KVM's instruction emulator, which runs all of a guest on some
# hosts, has no iret. Every VP runs this code on a page of its own:
#
#     0x000   256 dwords: how often each vector was taken
#     0x400   the fields below
#     0x1000  its end: the stack
#
# __init__.py puts the page's address into %ebx, and makes the stack segment begin there.
# `make guest` makes code.bin of this file.

        .code16

        # The vectors' stubs, which __init__.py makes: each is a call to `take`, of 3 bytes, in a place of 4.
        .set    STUBS, 0x2000

        # The fields of a page.
        .set    ASKED, 0x400            # how many accesses the VP was told to make
        .set    MADE, 0x404             # how many it has made
        .set    ROUTINE, 0x408          # the routine below that makes the next one
        .set    ADDRESS, 0x40c
        .set    VALUE, 0x410            # 8 bytes, to write or as read

        # The local APIC (Intel SDM volume 3, "Local APIC Register Address Map").
        .set    APIC, 0xfee00000
        .set    EOI, 0xb0
        .set    SPURIOUS, 0xf0
        .set    ENABLED, 0x1ff

        .globl  _start
_start:
        .long   run, take
        .long   write1, write2, write4, write8
        .long   read1, read2, read4, read8
        .long   out1, out2, out4

run:
        mov     $APIC, %edi
        movl    $ENABLED, SPURIOUS(%edi)
idle:
        cli                             # what is asked from here on interrupts the halt
        mov     ASKED(%ebx), %ecx
        cmp     %ecx, MADE(%ebx)
        jne     act
        sti
        hlt
        jmp     idle
act:
        sti
        mov     ADDRESS(%ebx), %edx
        lea     VALUE(%ebx), %esi
        mov     (%esi), %eax
        call    *ROUTINE(%ebx)
        incl    MADE(%ebx)
        jmp     idle

take:
        push    %eax
        movzwl  4(%esp), %eax           # the return address into the stub: STUBS + 3 + 4 * vector
        incl    -(STUBS + 3)(%ebx, %eax)
        movl    $0, EOI(%edi)
        pop     %eax
        add     $2, %sp
        iret

write1: mov     %al, (%edx)
        ret
write2: mov     %ax, (%edx)
        ret
write4: mov     %eax, (%edx)
        ret
write8: movq    (%esi), %mm0            # one access of 8 bytes
        movq    %mm0, (%edx)
        ret
read1:  mov     (%edx), %al
        mov     %al, (%esi)
        ret
read2:  mov     (%edx), %ax
        mov     %ax, (%esi)
        ret
read4:  mov     (%edx), %eax
        mov     %eax, (%esi)
        ret
read8:  movq    (%edx), %mm0
        movq    %mm0, (%esi)
        ret
out1:   out     %al, %dx
        ret
out2:   out     %ax, %dx
        ret
out4:   out     %eax, %dx
        ret
