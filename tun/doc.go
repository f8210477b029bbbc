// Package tun moves frames between the kernel's TUN device and the userspace stack, together with their offload
// header (struct virtio_net_hdr). A TCP super-segment of 64 KiB thus crosses in one system call, without being cut or
// merged on the way.
//
// The frames use several queues, which are read in turn, so a socket that floods the device fills only its own queue.
// A wireguard device holds one more queue, which is detached; it keeps the name, the MTU, the offloads and the
// lifetime of the interface and watches the link. On a device without the offload header, the wireguard device moves
// the frames itself, one packet at a time.
//
// tun/netns opens the device; tun/tuntest has one in memory.
package tun
