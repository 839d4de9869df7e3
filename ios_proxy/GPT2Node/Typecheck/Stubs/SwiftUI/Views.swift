// SwiftUI as far as we use it: views.

public struct Text: Primitive, Equatable, Sendable {
    nonisolated public init(_ key: LocalizedStringKey) {}
    @_disfavoredOverload nonisolated public init<S: StringProtocol>(_ content: S) {}
    nonisolated public func font(_ font: Font?) -> Text { self }
}

public struct Image: Primitive, Equatable, Sendable {
    nonisolated public init(systemName: String) {}
}

public struct Label<Title: View, Icon: View>: Primitive {
    nonisolated init() {}
}

extension Label where Title == Text, Icon == Image {
    nonisolated public init(_ titleKey: LocalizedStringKey, systemImage name: String) { self.init() }
}

public struct ButtonRole: Equatable, Sendable {
    public static let destructive = ButtonRole()
    public static let cancel = ButtonRole()
}

public struct Button<Content: View>: Primitive {
    nonisolated init() {}
}

extension Button where Content == Text {
    nonisolated public init(
        _ titleKey: LocalizedStringKey, role: ButtonRole? = nil, action: @escaping @MainActor () -> Void
    ) { self.init() }
}

extension Button where Content == Label<Text, Image> {
    nonisolated public init(
        _ titleKey: LocalizedStringKey, systemImage: String, role: ButtonRole? = nil,
        action: @escaping @MainActor () -> Void
    ) { self.init() }
}

public protocol Transferable {}
extension String: Transferable {}
extension Never: Transferable {}

public struct PasteButton: Primitive {
    /// It is not said on which thread `onPaste` is called.
    @preconcurrency nonisolated public init<T: Transferable>(
        payloadType: T.Type, onPaste: @escaping @Sendable ([T]) -> Void
    ) {}
}

public struct DefaultShareLinkLabel: Primitive {}

public struct ShareLink<Data: RandomAccessCollection, PreviewImage, PreviewIcon, Content: View>: Primitive
where PreviewImage: Transferable, PreviewIcon: Transferable, Data.Element: Transferable {
    nonisolated init() {}
}

extension ShareLink
where
    PreviewImage == Never, PreviewIcon == Never, Data == CollectionOfOne<String>, Content == DefaultShareLinkLabel
{
    nonisolated public init(
        _ titleKey: LocalizedStringKey, item: String, subject: Text? = nil, message: Text? = nil
    ) { self.init() }
}

public struct LabeledContent<Title: View, Content: View>: Primitive {
    nonisolated init() {}
}

extension LabeledContent where Title == Text, Content == Text {
    nonisolated public init<S: StringProtocol>(_ titleKey: LocalizedStringKey, value: S) { self.init() }
    @_disfavoredOverload
    nonisolated public init<S1: StringProtocol, S2: StringProtocol>(_ title: S1, value: S2) { self.init() }
}

public struct ProgressView: Primitive {
    nonisolated public init<V: BinaryFloatingPoint>(value: V?, total: V = 1.0) {}
}

// MARK: - Containers

public struct HorizontalAlignment: Equatable, Sendable {
    public static let leading = HorizontalAlignment()
    public static let center = HorizontalAlignment()
}

public struct VerticalAlignment: Equatable, Sendable {
    public static let firstTextBaseline = VerticalAlignment()
    public static let center = VerticalAlignment()
}

public struct HStack<Content: View>: Primitive {
    nonisolated public init(
        alignment: VerticalAlignment = .center, spacing: Double? = nil, @ViewBuilder content: () -> Content
    ) {}
}

public struct VStack<Content: View>: Primitive {
    nonisolated public init(
        alignment: HorizontalAlignment = .center, spacing: Double? = nil, @ViewBuilder content: () -> Content
    ) {}
}

public struct TabView<Content: View>: Primitive {
    nonisolated public init(@ViewBuilder content: () -> Content) {}
}

public struct NavigationStack<Root: View>: Primitive {
    nonisolated public init(@ViewBuilder root: () -> Root) {}
}

public struct ForEach<Data: RandomAccessCollection, Content: View>: Primitive where Data.Element: Identifiable {
    nonisolated public init(_ data: Data, @ViewBuilder content: @escaping (Data.Element) -> Content) {}
}

public struct List<Content: View>: Primitive {
    nonisolated public init(@ViewBuilder content: () -> Content) {}
    nonisolated public init<Data: RandomAccessCollection, Row: View>(
        _ data: Data, @ViewBuilder rowContent: @escaping (Data.Element) -> Row
    ) where Content == ForEach<Data, Row>, Data.Element: Identifiable {}
}

public struct Section<Header: View, Content: View, Footer: View>: Primitive {
    nonisolated public init(
        @ViewBuilder content: () -> Content, @ViewBuilder header: () -> Header, @ViewBuilder footer: () -> Footer
    ) {}
}

extension Section where Header == EmptyView {
    nonisolated public init(@ViewBuilder content: () -> Content, @ViewBuilder footer: () -> Footer) {
        self.init(content: content, header: { EmptyView() }, footer: footer)
    }
}

extension Section where Header == EmptyView, Footer == EmptyView {
    nonisolated public init(@ViewBuilder content: () -> Content) {
        self.init(content: content, header: { EmptyView() }, footer: { EmptyView() })
    }
}

extension Section where Header == Text, Footer == EmptyView {
    nonisolated public init(_ titleKey: LocalizedStringKey, @ViewBuilder content: () -> Content) {
        self.init(content: content, header: { Text(titleKey) }, footer: { EmptyView() })
    }
}

// MARK: - Colours and fonts

public protocol ShapeStyle: Sendable {}

public struct HierarchicalShapeStyle: ShapeStyle {}
extension ShapeStyle where Self == HierarchicalShapeStyle {
    public static var secondary: HierarchicalShapeStyle { HierarchicalShapeStyle() }
}

public struct Color: Primitive, ShapeStyle, Hashable {
    public static let black = Color()
    public static let blue = Color()
    public static let green = Color()
    public static let orange = Color()
    public static let red = Color()
    public static let secondary = Color()
}

public struct Font: Hashable, Sendable {
    public static let largeTitle = Font()
    public static let title2 = Font()
    public static let headline = Font()
    public static let footnote = Font()
    public func monospaced() -> Font { self }
    public func monospacedDigit() -> Font { self }
}
