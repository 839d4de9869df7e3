// The addresses at which this device can be reached, for a person who writes the ring's settings.
//
// Knows: the system's network interfaces, which of them lead to other machines.
// Must not know: who listens, and at which port.

import Foundation

#if canImport(Glibc)
    import Glibc
#elseif canImport(Musl)
    import Musl
#endif

public enum Addresses {
    /// The IPv4 addresses of the network interfaces that are up, those that a router gave first.
    public static var here: [String] {
        var first: UnsafeMutablePointer<ifaddrs>?
        guard getifaddrs(&first) == 0 else { return [] }
        defer { freeifaddrs(first) }
        let found = sequence(first: first) { $0?.pointee.ifa_next }.prefix { $0 != nil }.compactMap { entry in
            entry.flatMap { address(of: $0.pointee) }
        }
        return sorted(found)
    }

    /// An interface's name and address, if other machines reach it there.
    private static func address(of entry: ifaddrs) -> (interface: String, address: String)? {
        let flags = Int32(truncatingIfNeeded: entry.ifa_flags)
        let (up, loopback) = (Int32(truncatingIfNeeded: Int(IFF_UP)), Int32(truncatingIfNeeded: Int(IFF_LOOPBACK)))
        guard flags & up != 0, flags & loopback == 0, let socketAddress = entry.ifa_addr,
            Int32(socketAddress.pointee.sa_family) == AF_INET
        else { return nil }
        var text = [CChar](repeating: 0, count: Int(NI_MAXHOST))
        let length = socklen_t(MemoryLayout<sockaddr_in>.size)
        guard getnameinfo(socketAddress, length, &text, socklen_t(text.count), nil, 0, NI_NUMERICHOST) == 0 else {
            return nil
        }
        return (
            String(cString: entry.ifa_name), String(decoding: text.prefix { $0 != 0 }.map(UInt8.init), as: UTF8.self)
        )
    }

    /// Without those that lead to no ring: telephony (`pdp_ip`), tunnels, links between Apple's devices. Last come the
    /// addresses that a device gives itself where no router does, as over a cable.
    static func sorted(_ found: [(interface: String, address: String)]) -> [String] {
        let useless = ["pdp_ip", "utun", "ipsec", "awdl", "llw", "docker", "veth"]
        let useful = found.filter { entry in !useless.contains { entry.interface.hasPrefix($0) } }.map(\.address)
        return useful.filter { !$0.hasPrefix("169.254.") } + useful.filter { $0.hasPrefix("169.254.") }
    }
}
