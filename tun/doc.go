// Package tun moves frames between the kernel's TUN device and the userspace stack, together with their offload
// header (struct virtio_net_hdr): so a 64 KiB TCP super-segment crosses in one system call and is neither cut nor
// merged on the way. The frames have several queues, which are read in turn: one socket's flood fills its own. A wireguard
// device on one more queue, which is detached, keeps the name, the MTU, the offloads and the lifetime, and watches the link.
// Without the header that device moves the frames itself, one packet at a time. tun/netns opens the device; tun/tuntest has
// one in memory.
package tun
