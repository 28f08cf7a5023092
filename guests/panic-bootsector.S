/*
 * A guest in 512 bytes that reports a kernel panic: it writes to QEMU's pvpanic device as Linux
 * does, through the memory of the PCI device. Tests use the slot of src/qemu/topology.rs.
 *
 * Before that it prints "BOOTSECTOR-OK" on COM1.
 *
 *   as --32 panic-bootsector.S -o b.o
 *   ld -m elf_i386 -Ttext 0x7c00 --oformat binary b.o -o panic-bootsector.bin
 *
 * Register: docs/specs/pvpanic.rst of QEMU; bit 0 reports a panic.
 */
        .set    COM1, 0x3f8
        .set    BAR0, 0x80001010        /* bus 0, slot 2, base address register 0 */

        .code16
        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp
        movw    $banner, %si
        movw    $COM1, %dx
1:      lodsb
        testb   %al, %al
        jz      2f
        outb    %al, %dx
        jmp     1b

2:      movw    $0xcf8, %dx
        movl    $BAR0, %eax
        outl    %eax, %dx
        movw    $0xcfc, %dx
        inl     %dx, %eax
        andl    $~0xf, %eax
        movl    %eax, %edi

        /* Loading es in protected mode lets it address all 4 GiB. */
        lgdt    gdtr
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        jmp     3f
3:      movw    $8, %bx
        movw    %bx, %es
        andb    $0xfe, %al
        movl    %eax, %cr0
        movb    $1, %es:(%edi)
4:      hlt
        jmp     4b

banner: .asciz  "BOOTSECTOR-OK\n"
        .balign 8
gdt:    .quad   0, 0x00cf92000000ffff   /* null descriptor; data, 4 GiB */
gdtr:   .word   15
        .long   gdt
        .org    510
        .word   0xaa55
