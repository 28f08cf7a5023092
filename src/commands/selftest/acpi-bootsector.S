/*
 * A guest in 512 bytes that takes part in ACPI hot-plug on QEMU's q35 and pc machines, for tests that need a
 * guest's answer but no operating system. It boots in 0.2 s under TCG.
 *
 * On COM1 it prints "BOOTSECTOR-OK", then for ever:
 *   - a device was added behind hot-plug bus n ('0' + n):    prints "U<n>"
 *   - QEMU asks to unplug a device of bus n:                  ejects it, prints "D<n>"
 *   - the power button, or 'q' on COM1:                       prints "OFF" and powers off
 *   - 'e' on COM1:                                            ejects every device nobody asked for
 *
 * SeaBIOS does not boot from a disk of less than 504 KiB: pad it with zeros.
 *
 * With MUTE defined it looks at neither unplug requests nor the power button: a guest that never answers.
 *
 *   as --32 [--defsym MUTE=1] acpi-bootsector.S -o b.o
 *   ld -m elf_i386 -Ttext 0x7c00 --oformat binary b.o -o acpi-bootsector[-mute].bin
 *
 * Registers: docs/specs/acpi_pci_hotplug.rst of QEMU, ICH9 power management at 0x600 as SeaBIOS sets it.
 */
        .set    COM1,     0x3f8         /* data; line status at +5, bit 0: a byte waits */
        .set    SMI_CMD,  0x0b2         /* 2 switches ACPI on */
        .set    PM1_STS,  0x600         /* bit 8: power button was pressed */
        .set    PM1_EN,   0x602         /* bit 8: power button counts */
        .set    PM1_CNT,  0x604         /* 0x2000: sleep state S5, off */
        .set    PCI_UP,   0xcc0         /* devices added on the selected bus, one bit a slot; reading clears */
        .set    PCI_DOWN, 0xcc4         /* devices asked to go */
        .set    PCI_EJ,   0xcc8         /* writing a bit ejects */
        .set    PCI_SEL,  0xcd0         /* which bus the other three mean */
        .set    BUSES,    32

        .code16
        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp
        movw    $banner, %si
        call    puts
        movw    $SMI_CMD, %dx
        movb    $2, %al
        outb    %al, %dx
        movw    $PM1_EN, %dx
        movw    $0x100, %ax
        outw    %ax, %dx

round:  xorl    %ebx, %ebx
1:      call    select
        movw    $PCI_UP, %dx
        inl     %dx, %eax
        testl   %eax, %eax
        jz      2f
        movb    $'U', %al
        call    report
2:
.ifndef MUTE
        movw    $PCI_DOWN, %dx
        inl     %dx, %eax
        testl   %eax, %eax
        jz      3f
        movw    $PCI_EJ, %dx
        outl    %eax, %dx
        movb    $'D', %al
        call    report
3:
.endif
        incl    %ebx
        cmpl    $BUSES, %ebx
        jb      1b
.ifndef MUTE
        movw    $PM1_STS, %dx
        inw     %dx, %ax
        testw   $0x100, %ax
        jnz     off
.endif
        movw    $(COM1 + 5), %dx
        inb     %dx, %al
        testb   $1, %al
        jz      round
        movw    $COM1, %dx
        inb     %dx, %al
        cmpb    $'q', %al
        je      off
        cmpb    $'e', %al
        jne     round

        xorl    %ebx, %ebx
4:      call    select
        movw    $PCI_EJ, %dx
        movl    $1, %eax
        outl    %eax, %dx
        incl    %ebx
        cmpl    $BUSES, %ebx
        jb      4b
        jmp     round

off:    movw    $farewell, %si
        call    puts
        movw    $PM1_CNT, %dx
        movw    $0x2000, %ax
        outw    %ax, %dx
5:      hlt
        jmp     5b

/* Selects bus %ebx. */
select: movw    $PCI_SEL, %dx
        movl    %ebx, %eax
        outl    %eax, %dx
        ret

/* Prints %al, the bus's number and a line feed. */
report: movw    $COM1, %dx
        outb    %al, %dx
        movb    %bl, %al
        addb    $'0', %al
        outb    %al, %dx
        movb    $'\n', %al
        outb    %al, %dx
        ret

/* Prints the text at %si up to its zero. */
puts:   movw    $COM1, %dx
6:      lodsb
        testb   %al, %al
        jz      7f
        outb    %al, %dx
        jmp     6b
7:      ret

banner:   .asciz "BOOTSECTOR-OK\n"
farewell: .asciz "OFF\n"
        .org    510
        .word   0xaa55
