import { Alg } from 'tpm2-ts-bindings';

/** Published test vectors, with where they come from. */

/** Spaces and line ends do not count. */
export const hex = (text: string): Buffer => Buffer.from(text.replaceAll(/\s/g, ''), 'hex');

interface KdfVector {
  readonly name: string;
  readonly alg: number;
  /** Key of KDFa, Z of KDFe. */
  readonly key: string;
  readonly label: string;
  readonly u: string;
  readonly v: string;
  readonly bits: number;
  readonly result: string;
}

/**
 * TPM-specific vectors of "tpm-test-vectors" (validated against TPM simulators, Apache-2.0), as published in
 * google/go-tpm, tpm2/test/testvectors/kdfa.json; the names are theirs.
 */
export const KDFA: readonly KdfVector[] = [
  {
    name: '08_SHA1_400',
    alg: Alg.SHA1,
    key: 'f33e8c7d0efe0f',
    label: 'CFB',
    u: '002ba8440f2e389a7a086726c47b2bc332a0',
    v: 'fb4746f1b68c0f75174fa7',
    bits: 400,
    result:
      '6e5d4c0212cb1f908c0aa34c91f74b3bf429eab89f0b532b1cc7f34f240ee100c63e0b4cf5bb0017e178ef8902a5bf18a3fd',
  },
  {
    name: '28_SHA256_17',
    alg: Alg.SHA256,
    key: 'ff5625623188b99180b53e96108e3e01d19c18db598631d56c',
    label: 'STORAGE',
    u: 'ef12916d91f3ed8355f100ef7d3553ff69eb63edd59a0048eeda77',
    v: '800bce408c34f800',
    bits: 17,
    result: '0051bb',
  },
  {
    name: '30_SHA256_200',
    alg: Alg.SHA256,
    key: '',
    label: 'SECRET',
    u: 'fbf51f160255018bbc8efea4c36ac4fb4cbba34e9eff',
    v: '3cea0fdc2600',
    bits: 200,
    result: 'a26c73dca13a265e09eec4b0abc4ecb2bf8d26db04e8823ee6',
  },
  {
    name: '38_SHA256_552',
    alg: Alg.SHA256,
    key: 'e38573d849a5cfc9973f58b4535e42b7c08ef28b1b3e775375b5c66b9644be',
    label: 'STORAGE',
    u: '00586dccbebc998087e4',
    v: '',
    bits: 552,
    result: `968f349b066ed26be3bd4e78333eb5c5b51c26ea376efe5dfaf061a2cf7f5eb82e4fcc2a30736e30f12b48ab17efd10576a4cf33
      450324b3f20011628df7a07c411f8c0f6c`,
  },
  {
    name: '62_SHA384_528',
    alg: Alg.SHA384,
    key: 'e6c8422bede9724223e23a3a9c9364a2fe0042a27bd24484d467d2cb936b0d78a0d583f5574fd9f14f72f6e833',
    label: 'IDENTITY',
    u: 'ffb259ea49aee027af8491d41a438d07e0ae061131815e24398e759c82e67cf7becac6d4d1b31d',
    v: '00fc431cac1d532d09030e2ab3e7',
    bits: 528,
    result: `5c4022860654b6cd81f650e68533cb4a0cadea6bbf06ec513d9f1bdd21736aea8fc95be08d7412d449277de7227fdc644ff9e61a
      676dc34c440be0b3238501f55939`,
  },
  {
    name: '79_SHA512_120',
    alg: Alg.SHA512,
    key: 'f6829d524d11a31db8907f44ea5e21442b9edb27b4d46e6f66944357cd29068906a93a3e936a0d7532cc0e00',
    label: 'OBFUSCATE',
    u: '43c9d69244be6610f663c48dd9f0472e0cebc18c',
    v: '2f7de74cd72c4bd6a86d4eb225d8b608068bad852378431bd211c0899a6d7c9dbc206fdb0642',
    bits: 120,
    result: 'eb4b38b54d3fbbedd164870bd46298',
  },
];

/** Of the same source, kdfe.json. */
export const KDFE: readonly KdfVector[] = [
  {
    name: '04_SHA1_320',
    alg: Alg.SHA1,
    key: 'fffaefd2dcf59ac10ffee96d388ecc7fa0274b25',
    label: 'INTEGRITY',
    u: 'ff7876ca3325140c1739',
    v: 'ffdaea80b8',
    bits: 320,
    result: '39bde917d4529cfb171ebb49c8aa83777481f50cf0df162c3f12b9c8ab21ddcbed2e8a8b688c8b66',
  },
  {
    name: '28_SHA256_3',
    alg: Alg.SHA256,
    key: 'ace0b616d2536451ca1fe0d9744107b88e5500',
    label: 'IDENTITY',
    u: 'e5aeb5370365c400',
    v: '2e3345f6e9cca8341eb82e4098fe',
    bits: 3,
    result: '07',
  },
  {
    name: '37_SHA256_728',
    alg: Alg.SHA256,
    key: '6cbfdee9e66367b676',
    label: 'STORAGE',
    u: 'c303fe79ff',
    v: '79e34519a8a32f13d400',
    bits: 728,
    result: `e59560660988b3d66e3a76bcc96110cc199bfa0418dca315f7070619e04fa0b6cdb2912db3786aaa34f2cad7dcee560eed2b4c3f
      7566e533e4a3bba9c9364397dd2ce45a0b85dde5c83fea27b4fb20bb0125346d24e5d9321f81b2`,
  },
  {
    name: '70_SHA384_848',
    alg: Alg.SHA384,
    key: '8400',
    label: 'STORAGE',
    u: '0e4914a46bd8ce8c442e0a683004a8e883847e0472046c1c572db21fcc3ab62d4269fe47d1dc1cff',
    v: 'ffeb496d6bd09f',
    bits: 848,
    result: `7d4e82641b2e88c70627b74929444b076a01ad6d64b18461e7d69ba6fee963eb4ffd161f2883584e533a372b1c352177803e5309
      f86e8a52067b6b9a3aa723ecfd26d33d82c94071051f2af65af49068280f33cf8529077ca4b874eaca0064b6df1309ee063350c9eef6`,
  },
  {
    name: '81_SHA512_251',
    alg: Alg.SHA512,
    key: '9c5f3dd400',
    label: 'ATH',
    u: '00e938019716b6efde584100',
    v: '68b6a856575b6d220127e59e99575782d6eb9bd63e0f37d11c7a440c7085b0f8adfd7cea4124d891a8e99d2e4e2f4cb400',
    bits: 251,
    result: '022489cad564683b98547cf28ae2fbccab62a6407edceb9dbc79cff882715fb1',
  },
];

interface KemVector {
  readonly name: string;
  readonly label: string;
  /** TPMT_PUBLIC and TPMT_SENSITIVE. */
  readonly key: string;
  readonly privateKey: string;
  readonly secret: string;
  readonly ciphertext: string;
}

const P256_SHA256 = {
  key: `0023000b000304600020bef56b8c1cc84e11edd717528d2cd99356bd2bbf8f015209c3f84aeeaba8e8a2000600800043001000030010
    0020f126562cedff2fa344c6234085de4250112ecf72d0714336970de012ba977da9
    002017436ee1160921fdd2ed033e11ba04ed0cedf2ca462246118a359f8eb469b531`,
  privateKey: `00230020000000000000000000000000000000000000000000000000000000000000000000
    20815aef7ffcf30fd7459424e0b1b6a831e78416f26ac2101ddba7bf72f98c9789
    0020b93b64cb3b88ab2992073cda3590095d4351d3c7e8c940dbbe83ba71f47e3749`,
};

/** Of the same source, ecc_labeled_encaps.json and rsa_labeled_encaps.json: each was opened by the command it is for. */
export const KEM: readonly KemVector[] = [
  {
    name: '03_R_P256_SHA256_128, TPM2_Import',
    label: 'DUPLICATE',
    ...P256_SHA256,
    secret: 'a5431a977aec986501072f459370c9262c63c8aca67abbc4f38d630ce87ceac9',
    ciphertext: `0020efde7cc0e3716d6c32b7bf205c7366510077cdde1d3ae9b74f5d0d40c366c7a9
      0020450fa9743be1bd40757acb731bbb9b1466c845b895affacc15d107991a75ba5f`,
  },
  {
    name: '04_R_P256_SHA256_128, TPM2_StartAuthSession',
    label: 'SECRET',
    ...P256_SHA256,
    secret: 'cabb2edd36e5253664b558de2ddf8ac9deea99168ab0edb6c2d06a1d90c62c4e',
    ciphertext: `0020544e4be9da6b7060a90307ed83cad6a9b45502f9e400bf0c3cb99f9a1dbe733b
      0020f1186daa24d1e57d0dc7b6700d2693068c6a5cef84c57fa7cbe5c04950b024f3`,
  },
  {
    name: '05_R_P256_SHA256_128, TPM2_ActivateCredential',
    label: 'IDENTITY',
    ...P256_SHA256,
    secret: '88d8f97b4b8fd8bd1751ca32b5a3aa14c91163ad984b5c732e400572a8525edc',
    ciphertext: `00200173de00ffb1981886c1fd3039b2de4e6dd1eb34634be4d9ce27a46455633606
      002083ba87eb7c9a032cc36ab674fc48266c4255aeb312d069893b6ea74fbcb21c3f`,
  },
  {
    name: '03_R_2048_SHA1_256, TPM2_StartAuthSession',
    label: 'SECRET',
    key: `0001000400030460001495c1ee7fc5a82c31f673eac2e21cbd408a23cb4a00060100004300100800000000000100802eb69a
      7844f77b6614b32c683be99a01caabb516719b17be0019f618923ad3eb9c4aa7c80fd02d3b9487a7154b7f65dfaa8caf5046
      292fac0825cce6a1d3d05960ee1d89a8ab9bafdab80e52a1f741eadc2a8bb8ac3739c6eeae72cbd6739837adfca85cf4117b
      557865c849b8c927b7abebf4e53e6e75c768ce5f0837d726e99fc8bd85655c1b43d1dd7c2ce23f7fedb79834fa08d3bc7e7a
      74a1b675dfa1839589cbc773f51cbc8c05e22516bda5a02ad59501cdd8081d4f3928060d2d1df1b35a8a9d324313e184f1e1
      832688d2b7f0b688b655ae5425475fa632430899dd1eeca92847d48b337cc10fac30dae87d7bb438f1b956da4c2d376f0c8d
      8fb3`,
    privateKey: `0001001400000000000000000000000000000000000000000014595b5532340216ff4f8547cbe497682afb19240d0080b528
      6ae9b6ab8364f089562d4737397bc5c93805750f8d5d23663f4ee010158c4d1ba6cb43a4a57bb6f586f2e45a5eb041a054bc
      40b158c5e6d6b456543f00c99089c60b8576fefb39c18126b27f14adf5183834000a51fe90db20e894d28a329067a0c85eed
      8b02e777d73d84871bec454a6fbce34a93a9a8905cca2caa54e5`,
    secret: 'ff06374789c07501fd518bb6537c1b36e5eed530',
    ciphertext: `1c2805d890c802222d5143f3c35263788ea1951967c75079481e2c1f8fd2b5a10423be59320db93b350187d819071d4874c6
      a409a2279a89f31a4d41a922f725cddd70430f243b6f8e3587f862925b65d0feb46550847ea072025353bc898709de9e4b77
      8d204b0829d11fce93450f89fd2f6aee9a33dda9f29ee5f84a73a2dfc51a9920568e8715eee5762d27d065823a3e9facbbc1
      26736a2ff01b9ad974afef1c32e44030f67592f1a3607ce24750ee5b995a06f3980939c4428bb6df4b8ad719a4b9ded17b22
      b1b303eaec92cd4027a4b2d719a762679fa9a296de0e05d95084e6f0c8725bc2db71ec56107603eefedc68237ec3ba989e5e
      7ffcb4186e37`,
  },
];

/** NIST SP 800-38A, F.3.13, F.3.15 and F.3.17: the same IV and plaintext with three key sizes. */
export const CFB_IV = hex('000102030405060708090a0b0c0d0e0f');
export const CFB_PLAIN = hex(`6bc1bee22e409f96e93d7e117393172a ae2d8a571e03ac9c9eb76fac45af8e51
  30c81c46a35ce411e5fbc1191a0a52ef f69f2445df4f9b17ad2b417be66c3710`);
export const CFB = [
  {
    name: 'CFB128-AES128',
    key: '2b7e151628aed2a6abf7158809cf4f3c',
    cipher: `3b3fd92eb72dad20333449f8e83cfb4a c8a64537a0b3a93fcde3cdad9f1ce58b
      26751f67a3cbb140b1808cf187a4f4df c04b05357c5d1c0eeac4c66f9ff7f2e6`,
  },
  {
    name: 'CFB128-AES192',
    key: '8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b',
    cipher: `cdc80d6fddf18cab34c25909c99a4174 67ce7f7f81173621961a2b70171d3d7a
      2e1e8a1dd59b88b1c8e60fed1efac4c9 c05f9f9ca9834fa042ae8fba584b09ff`,
  },
  {
    name: 'CFB128-AES256',
    key: '603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4',
    cipher: `dc7e84bfda79164b7ecd8486985d3860 39ffed143b28b1c832113c6331e5407b
      df10132415e54b92a13ed0a8267ae2f9 75a385741ab9cef82031623d55b1e471`,
  },
] as const;
